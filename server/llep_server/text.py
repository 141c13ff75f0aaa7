"""Families as Prometheus text or OpenMetrics. prometheus_client's encoders take longer, for names that need care.

Ours never do: metric and label names are plain, and no sample has a timestamp or an exemplar.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

from prometheus_client.utils import floatToGoString

from llep_server.samples import ENGINE_LABELS, Bucketed, Observed, Sample, Shown

PLAIN_BELOW = 1_000_000  # whole numbers from here on are written with an exponent


def encode(families: Iterable[Shown], *, is_openmetrics: bool) -> bytes:
    """The whole page."""
    lines: list[str] = []
    for family in families:
        # Prometheus' own format knows no families: there the name of a counter is that of its samples.
        name = family.name.removesuffix("_total") if is_openmetrics else family.name
        words = _escape(family.help) if is_openmetrics else _escape_help(family.help)
        kind = family.kind.__name__.removesuffix("MetricFamily").lower()
        lines += (f"# HELP {name} {words}", f"# TYPE {name} {kind}")
        for names, samples in family.by_engine:
            ours = _labels(ENGINE_LABELS, names) if names else ""
            for sample in samples:
                lines += _lines(family, ours, sample)
    return "\n".join([*lines, *(["# EOF"] if is_openmetrics else []), ""]).encode()


def _lines(family: Shown, ours: str, sample: Sample) -> Iterator[str] | tuple[str, ...]:
    """ours: labels of the engine."""
    labels, value = sample
    theirs = _labels(family.labels, labels) if labels else ""
    inner = f"{ours},{theirs}" if ours and theirs else ours or theirs
    if isinstance(value, Bucketed):
        return _histogram(family.name, inner, value)
    if isinstance(value, Observed):
        return (
            f"{family.name}_count{{{inner}}} {_number(value.count)}",
            f"{family.name}_sum{{{inner}}} {_number(value.sum)}",
        )
    return (f"{family.name}{{{inner}}} {_number(value)}" if inner else f"{family.name} {_number(value)}",)


def _histogram(name: str, inner: str, value: Bucketed) -> Iterator[str]:
    total = 0
    for bound, total in zip(_bounds(value.bounds), itertools.accumulate(value.histogram.counts), strict=True):
        yield f"{name}_bucket{{{inner},{bound}}} {_number(total)}"
    yield f"{name}_count{{{inner}}} {_number(total)}"
    yield f"{name}_sum{{{inner}}} {_number(value.histogram.sum)}"


@lru_cache(maxsize=64)
def _bounds(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f'le="{bound}"' for bound in (*map(str, bounds), "+Inf"))


@lru_cache(maxsize=16384)
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))


def _number(value: float) -> str:
    if type(value) is int and -PLAIN_BELOW < value < PLAIN_BELOW:
        return f"{value}.0"
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return text


def _escape(text: str) -> str:
    return _escape_help(text).replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
