"""The text of /metrics: made from the scheduler's newest snapshot, in slices, and kept for a moment."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from llep.config import MetricsLevel, Settings
from llep.errors import LlepError
from llep_server.families import FAMILIES, SCHEDULER_FAMILIES, refusals
from llep_server.samples import LEVELS, Level, Sample, ScrapedEngine, Shown
from llep_server.scheduler import Scheduler
from llep_server.slices import sliced
from llep_server.text import texts

logger = logging.getLogger(__name__)

KEEP_S = 1.0
DEFAULTS = Settings()


class Exposition:
    """The page that Prometheus reads. However many ask, the scheduler is asked once in keep_s."""

    def __init__(self, scheduler: Scheduler, keep_s: float = KEEP_S) -> None:
        self.keep_s = keep_s
        self._scheduler = scheduler
        self._lock = asyncio.Lock()
        self._made_at = -math.inf
        self._shown: list[Shown] = []
        self._pages: dict[str, bytes] = {}
        self._dropped: dict[str, int] = {}

    async def page(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, of those that the Accept header takes."""
        _, content_type = choose_encoder(accept)
        is_openmetrics = content_type.startswith("application/openmetrics-text")
        async with self._lock:
            await self._refresh()
            if content_type not in self._pages:
                found = [text async for text in sliced(texts(self._shown, is_openmetrics=is_openmetrics))]
                self._pages[content_type] = "".join(found).encode()
            return self._pages[content_type], content_type

    async def shown(self) -> list[Shown]:
        """What is on the page."""
        async with self._lock:
            await self._refresh()
            return self._shown

    async def _refresh(self) -> None:
        if time.monotonic() - self._made_at >= self.keep_s:
            self._shown = await self._collect()
            self._pages.clear()
            self._made_at = time.monotonic()

    async def _collect(self) -> list[Shown]:
        try:
            snapshot = await self._scheduler.snapshot()
        except LlepError as error:
            logger.debug("no snapshot for /metrics: %s", error.message)
            return [_scheduler_gauge("llep_scheduler_up", False)]
        collection = Collection()
        async for engine in sliced(snapshot.engines):
            if engine.speaker:
                collection.add(ScrapedEngine.of(engine))
            else:
                collection.add_refusals(engine.engine, engine.refused)
        collection.add_refusals("", snapshot.refused)
        self._warn(collection.dropped)
        return [
            _scheduler_gauge("llep_scheduler_up", True),
            _scheduler_gauge("llep_scheduler_store_open", snapshot.store_open),
            *collection.shown,
        ]

    def _warn(self, dropped: dict[str, int]) -> None:
        """Of engines that show less than before."""
        for engine, levels in dropped.items():
            if levels > self._dropped.get(engine, 0):
                logger.warning(
                    "engine %s: %d levels of detail left out of /metrics, or there would be more series than "
                    "metrics_max_series: raise it or lower metrics_level",
                    *(engine, levels),
                )
        self._dropped = dropped


class Collection:
    """Families, and what each engine shows of them within its metrics_max_series."""

    def __init__(self) -> None:
        self._families = {family.name: family.shown() for family in FAMILIES}
        self.dropped: dict[str, int] = {}  # levels by engine

    @property
    def shown(self) -> list[Shown]:
        """The families that have a sample."""
        return [family for family in self._families.values() if family.by_engine]

    def add(self, engine: ScrapedEngine) -> None:
        samples, level, wanted = _samples_within_budget(engine)
        self.dropped[engine.snapshot.engine] = wanted - level
        engine = replace(engine, levels_dropped=wanted - level)
        names = (engine.info.model_name, engine.snapshot.engine)
        for family in FAMILIES:
            if family.level > level:
                continue
            found = list(family.read(engine)) if family.level is Level.ALWAYS else samples[family.name]
            if found:
                self._families[family.name].by_engine.append((names, found))

    def add_refusals(self, engine: str, refused: Mapping[str, int]) -> None:
        """Reports that were refused, where nothing else is known of their engine."""
        if refused:
            self._families["llep_errors_total"].by_engine.append((("", engine), list(refusals(refused))))


def _samples_within_budget(engine: ScrapedEngine) -> tuple[dict[str, list[Sample]], Level, Level]:
    """Samples by family, the level that fits metrics_max_series, and the level that metrics_level asks for."""
    wanted = LEVELS[MetricsLevel(engine.setting("metrics_level") or DEFAULTS.metrics_level)]
    budget = int(engine.setting("metrics_max_series") or DEFAULTS.metrics_max_series)
    samples: dict[str, list[Sample]] = {}
    series = dict.fromkeys(Level, 0)
    for family in FAMILIES:
        if family.level <= wanted:
            samples[family.name] = list(family.read(engine))
            series[family.level] += family.series_of(samples[family.name])
    level = wanted
    while level > Level.ALWAYS and sum(series[lower] for lower in Level if lower <= level) > budget:
        level = Level(level - 1)
    return samples, level, wanted


def _scheduler_gauge(name: str, value: bool) -> Shown:
    return Shown(name, GaugeMetricFamily, SCHEDULER_FAMILIES[name], (), [((), [((), int(value))])])
