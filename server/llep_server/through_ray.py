"""What /metrics shows, sent through Ray as well: for a Prometheus that watches Ray's nodes alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client.core import Metric

from llep.errors import LlepError
from llep.scheduler.client import SET_RAY_METRICS
from llep.scheduler.ray_metrics import Family
from llep_server.metrics import Exposition
from llep_server.scheduler import Caller

logger = logging.getLogger(__name__)

EVERY_S = 5.0
TIMEOUT_S = 10.0


@asynccontextmanager
async def sending(exposition: Exposition, caller: Caller) -> AsyncIterator[None]:
    """Sends for as long as the block lasts."""
    task = asyncio.create_task(_keep_sending(exposition, caller), name="llep-ray-metrics")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _keep_sending(exposition: Exposition, caller: Caller) -> None:
    """Every EVERY_S, until cancelled. Without a way to Ray there is nobody to tell: the next time is tried again."""
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            families = flat(shown.metric() for shown in await exposition.shown())
            await caller.call(SET_RAY_METRICS, families=families, timeout_s=TIMEOUT_S)
        except LlepError as error:
            logger.debug("metrics did not get through Ray: %s", error.message)
        except Exception:
            logger.exception("metrics did not get through Ray")


def flat(metrics: Iterable[Metric]) -> list[Family]:
    """By names of samples: a histogram is three."""
    found: dict[str, tuple[str, str, tuple[str, ...], list[Any]]] = {}
    for metric in metrics:
        for sample in metric.samples:
            labels = tuple(sample.labels)
            family = found.setdefault(sample.name, (sample.name, metric.documentation, labels, []))
            family[3].append((tuple(sample.labels.values()), float(sample.value)))
    return list(found.values())
