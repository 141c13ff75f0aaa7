"""Metrics through Ray: its agents show what a process that has joined Ray sets, as `ray_` and the name.

For Prometheus servers that watch Ray's nodes alone. Ray's counters and histograms can only be added to, from 0 in each
process; ours are totals. So everything is set as a gauge under the name of its sample: PromQL does not mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# (name of the samples, what they are, names of labels, [(values of the labels, value), ...])
Family = tuple[str, str, Sequence[str], Sequence[tuple[Sequence[str], float]]]


class RayMetrics:
    """The gauges of this process. Ray must have been joined."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def set(self, families: Sequence[Family]) -> int:
        """Take over the values; how many there were. What was set once stays until this process ends."""
        from ray.util.metrics import Gauge

        for name, help_text, labels, samples in families:
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, help_text, tuple(labels))
            gauge = self._gauges[name]
            for values, value in samples:
                gauge.set(value, dict(zip(labels, values, strict=True)))
        return sum(len(samples) for *_, samples in families)
