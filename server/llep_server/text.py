"""Families as Prometheus text or OpenMetrics. prometheus_client's encoders take longer, for names that need care.

Ours never do: metric and label names are plain, and no sample has a timestamp or an exemplar.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import isfinite

from prometheus_client.utils import floatToGoString

from llep_server.samples import ENGINE_LABELS, Bucketed, Observed, Sample, Shown, Value


def texts(families: Iterable[Shown], *, is_openmetrics: bool) -> Iterator[str]:
    """The whole page, piece by piece."""
    for family in families:
        # Prometheus' own format knows no families: there the name of a counter is that of its samples.
        name = family.name.removesuffix("_total") if is_openmetrics else family.name
        words = _escape(family.help) if is_openmetrics else _escape_help(family.help)
        kind = family.kind.__name__.removesuffix("MetricFamily").lower()
        yield f"# HELP {name} {words}\n# TYPE {name} {kind}\n"
        for names, samples in family.by_engine:
            yield _lines(family, names, samples)
    if is_openmetrics:
        yield "# EOF\n"


def _lines(family: Shown, names: tuple[str, ...], samples: Sequence[Sample]) -> str:
    """Of one engine. A page has thousands of lines, and from page to page only their numbers change."""
    form = _form(family.name, names, family.labels)
    labels = [own for own, _ in samples]
    if form.labels != labels:
        form.labels = labels
        series = [each for own, value in samples for each in _series(family, names, own, value)]
        form.text = "".join(f"{each.replace('%', '%%')} %s\n" for each in series)
    if isinstance(samples[0][1], Bucketed | Observed):
        numbers = tuple(itertools.chain.from_iterable(value.numbers for _, value in samples))  # type: ignore[union-attr]
    else:
        numbers = tuple(value for _, value in samples)
    return form.text % (numbers if isfinite(sum(numbers)) else tuple(map(floatToGoString, numbers)))


class Form:
    """An engine's lines of a family, but for the numbers."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, ...]] = []
        self.text = ""


@lru_cache(maxsize=16384)
def _form(name: str, names: tuple[str, ...], own: tuple[str, ...]) -> Form:
    return Form()


def _series(family: Shown, names: tuple[str, ...], own: tuple[str, ...], value: Value) -> tuple[str, ...]:
    """What stands before the numbers of a sample."""
    pairs = [*(zip(ENGINE_LABELS, names, strict=True) if names else ()), *zip(family.labels, own, strict=True)]
    labels = [f'{label}="{_escape(text)}"' for label, text in pairs]
    match value:
        case Bucketed(bounds=bounds):
            buckets = [("_bucket", [f'le="{bound}"']) for bound in (*map(str, bounds), "+Inf")]
            ends = [*buckets, ("_count", []), ("_sum", [])]
        case Observed():
            ends = [("_count", []), ("_sum", [])]
        case _:
            ends = [("", [])]
    return tuple(_one_series(family.name + end, [*labels, *more]) for end, more in ends)


def _one_series(name: str, labels: list[str]) -> str:
    return f"{name}{{{','.join(labels)}}}" if labels else name


def _escape(text: str) -> str:
    return _escape_help(text).replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
