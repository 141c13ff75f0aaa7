"""What metric families are made of: an engine at a scrape, the values read off it, and how they are shown."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from llep.config import MetricsLevel
from llep.messages import EngineInfo, EngineSnapshot, GroupLoads, Histogram, RankSnapshot, Report

ENGINE_LABELS = ("model_name", "engine")


class Level(IntEnum):
    """How much detail a family is; an engine shows those up to its setting metrics_level."""

    ALWAYS = 0
    RANK = 1
    LAYER = 2
    LAYER_RANK = 3


LEVELS = {
    MetricsLevel.OFF: Level.ALWAYS,
    MetricsLevel.RANK: Level.RANK,
    MetricsLevel.LAYER: Level.LAYER,
    MetricsLevel.LAYER_RANK: Level.LAYER_RANK,
}


@dataclass(frozen=True, slots=True)
class Observed:
    """A summary's value."""

    count: int
    sum: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """In order of its series."""
        return self.count, self.sum


@dataclass(frozen=True, slots=True)
class Bucketed:
    """A histogram's value, with its buckets' upper bounds."""

    histogram: Histogram
    bounds: tuple[float, ...]

    @property
    def numbers(self) -> tuple[float, ...]:
        """In order of its series: the buckets, count and sum."""
        totals = tuple(itertools.accumulate(self.histogram.counts))
        return *totals, totals[-1], self.histogram.sum


Value = float | Observed | Bucketed
Sample = tuple[tuple[str, ...], Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapedEngine:
    """One engine at a scrape. `speaker`: who speaks for the group, its rank 0 once that has reported; `group` is what
    the EP group holds alike.
    """

    snapshot: EngineSnapshot
    speaker: Report
    levels_dropped: int = 0

    @classmethod
    def of(cls, snapshot: EngineSnapshot) -> Self:
        """Of an engine that has reported."""
        assert snapshot.speaker is not None
        return cls(snapshot=snapshot, speaker=snapshot.speaker)

    @property
    def ranks(self) -> Sequence[RankSnapshot]:
        return self.snapshot.ranks

    @property
    def info(self) -> EngineInfo:
        return self.speaker.info

    @property
    def group(self) -> GroupLoads | None:
        return self.speaker.group

    def setting(self, key: str) -> Any:
        return self.speaker.live_settings.get(key)


@dataclass(frozen=True, slots=True)
class Family:
    name: str  # as in the text, counters with _total
    kind: type[Metric]
    help: str
    labels: tuple[str, ...]  # after ENGINE_LABELS
    level: Level
    read: Callable[[ScrapedEngine], Iterable[Sample]]

    @property
    def type_name(self) -> str:
        return self.kind.__name__.removesuffix("MetricFamily").lower()

    def series_of(self, samples: Sequence[Sample]) -> int:
        """How many series samples of this family become."""
        if not samples:
            return 0
        match samples[0][1]:
            case Bucketed(bounds=bounds):
                return len(samples) * (len(bounds) + 3)
            case Observed():
                return len(samples) * 2
            case _:
                return len(samples)

    def shown(self) -> Shown:
        """Without samples yet."""
        return Shown(self.name, self.kind, self.help, self.labels, [])


@dataclass(frozen=True, slots=True)
class Shown:
    """A family on the page: the samples of each engine, after that engine's own labels (none for the scheduler's)."""

    name: str
    kind: type[Metric]
    help: str
    labels: tuple[str, ...]  # of the samples, after those of the engine
    by_engine: list[tuple[tuple[str, ...], Sequence[Sample]]]

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Names of the labels that each series has."""
        has_engines = any(names for names, _ in self.by_engine)
        return (*(ENGINE_LABELS if has_engines else ()), *self.labels)

    def metric(self) -> Metric:
        """As prometheus_client has it."""
        metric = self.kind(self.name, self.help, labels=self.all_labels)  # type: ignore[call-arg]
        for names, samples in self.by_engine:
            for labels, value in samples:
                _add(metric, (*names, *labels), value)
        return metric


def _add(metric: Metric, labels: Sequence[str], value: Value) -> None:
    match metric, value:
        case HistogramMetricFamily(), Bucketed(histogram, bounds):
            names = [*map(str, bounds), "+Inf"]
            buckets = zip(names, itertools.accumulate(histogram.counts), strict=True)
            metric.add_metric(labels, list(buckets), histogram.sum)
        case SummaryMetricFamily(), Observed(count, total):
            metric.add_metric(labels, count, total)
        case ((GaugeMetricFamily() | CounterMetricFamily()), (int() | float())):
            metric.add_metric(labels, value)
        case _:
            raise AssertionError(f"{metric.name} is a {metric.type}, {value!r} is not for it")
