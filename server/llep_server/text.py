"""Families as Prometheus text or OpenMetrics. prometheus_client's encoders take longer, for names that need care.

Ours never do: metric and label names are plain, and no sample has a timestamp or an exemplar.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString


def encode(metrics: Iterable[Metric], *, is_openmetrics: bool) -> bytes:
    """The whole page."""
    lines: list[str] = []
    for metric in metrics:
        # Prometheus' own format knows no families: there the name of a counter is that of its samples.
        name = metric.name if is_openmetrics or metric.type != "counter" else f"{metric.name}_total"
        words = _escape(metric.documentation) if is_openmetrics else _escape_help(metric.documentation)
        lines += (f"# HELP {name} {words}", f"# TYPE {name} {metric.type}")
        for sample in metric.samples:
            labels = ",".join([_label(*item) for item in sample.labels.items()])
            value = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
            lines.append(f"{sample.name}{{{labels}}} {value}" if labels else f"{sample.name} {value}")
    return "\n".join([*lines, *(["# EOF"] if is_openmetrics else []), ""]).encode()


@lru_cache(maxsize=4096)
def _label(name: str, value: str) -> str:
    return f'{name}="{_escape(value)}"'


def _escape(text: str) -> str:
    return _escape_help(text).replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
