"""Whether all parts are there and the engines run what they should: a pure judgement of what the scheduler says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llep.errors import LlepError
from llep.views import EngineState, EngineView, SchedulerStatus
from llep_server.scheduler import Scheduler
from llep_server.schemas import Check


async def check(scheduler: Scheduler) -> list[Check]:
    """One Check per part, in the order in which to repair them."""
    try:
        status, engines = await asyncio.gather(scheduler.status(), scheduler.engines())
    except LlepError as error:
        unknown = "not known while the scheduler does not answer"
        return [
            Check(name="scheduler", ok=False, message=error.message),
            Check(name="store", ok=False, message=unknown),
            Check(name="engines", ok=False, message=unknown),
            Check(name="settings", ok=False, message=unknown),
        ]
    return judge(status, engines)


def judge(status: SchedulerStatus, engines: Sequence[EngineView]) -> list[Check]:
    # Counts, no names: probes are answered without a key.
    live = [engine for engine in engines if engine.state is EngineState.LIVE]
    behind = [engine for engine in live if engine.held_revision < engine.desired_revision]
    store = (
        "open" if status.store_open else "not open: see the scheduler's log, and whether its disk is full or read-only"
    )
    fresh = f"{len(live)} of {len(engines)} engines report on all ranks"
    if not live:
        fresh += ": start one with the llep plugin and a scheduler address, or see its log"
    held = f"{len(live) - len(behind)} of {len(live)} fresh engines hold their desired revision on all ranks"
    if behind:
        held += ": see held_revision and last_apply_error in /v1/engines"
    return [
        Check(name="scheduler", ok=True, message=f"answers, version {status.version}"),
        Check(name="store", ok=status.store_open, message=store),
        Check(name="engines", ok=bool(live), message=fresh),
        Check(name="settings", ok=not behind, message=held),
    ]
