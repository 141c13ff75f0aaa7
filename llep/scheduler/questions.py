"""The part of the Scheduler that answers questions."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

from llep import __version__
from llep.errors import SettingsError, UnknownPlan
from llep.messages import (
    PROTOCOL,
    STAGES,
    STEP_PHASES,
    EngineSnapshot,
    SchedulerSnapshot,
    encode,
    rank_snapshot,
    without_experts,
)
from llep.scheduler.core import Core, check_limit, to_unix_time
from llep.scheduler.show import engine_view, settings_view
from llep.scheduler.show_loads import history, hot, hot_ratios, loads, matrix, plan_view
from llep.scheduler.windows import MOST_PLANS, Engine
from llep.views import SchedulerStatus


class Questions(Core):
    """Views of llep.views as plain JSON values."""

    async def engines(self) -> list[dict[str, Any]]:
        """EngineView of every engine by name."""
        self._tick()
        engines = sorted(self._windows.engines.items())
        return [
            engine_view(engine, self._journal.desired.revision_of(name), to_unix_time()).model_dump(mode="json")
            for name, engine in engines
        ]

    async def settings(self, engine: str | None = None) -> dict[str, Any]:
        """SettingsView of one engine, or of one that would start with defaults. Raises UnknownEngine."""
        self._tick()
        known = None if engine is None else self._engine(engine)
        return settings_view(known, self._journal.desired).model_dump(mode="json")

    async def loads(
        self, window_s: float = 10.0, engine: str | None = None, phase: str | None = None
    ) -> list[dict[str, Any]]:
        """EngineLoads of one engine or all, of one phase of steps or both. Raises UnknownEngine, SettingsError."""
        self._tick()
        _check_window("window_s", window_s)
        _check_choice("phase", phase, STEP_PHASES)
        chosen = [self._engine(engine)] if engine else [e for _, e in sorted(self._windows.engines.items())]
        now_s = time.monotonic()
        return [loads(e, window_s, now_s, self._interval_s(e), phase).model_dump(mode="json") for e in chosen]

    async def history(
        self, engine: str, window_s: float = 600.0, step_s: float = 10.0, phase: str | None = None
    ) -> list[dict[str, Any]]:
        """HistoryPoint at about every step_s, oldest first. Raises UnknownEngine, SettingsError."""
        self._tick()
        _check_window("window_s", window_s)
        _check_window("step_s", step_s)
        _check_choice("phase", phase, STEP_PHASES)
        points = history(self._engine(engine), window_s, step_s, to_unix_time(), phase)
        return [point.model_dump(mode="json") for point in points]

    async def matrix(
        self,
        engine: str,
        by: str = "rank",
        stage: str = "before",
        window_s: float = 60.0,
        phase: str | None = None,
    ) -> dict[str, Any]:
        """LoadMatrix: layers x ranks or experts. Raises UnknownEngine, SettingsError."""
        self._tick()
        _check_window("window_s", window_s)
        _check_choice("by", by, ("rank", "expert"))
        _check_choice("stage", stage, STAGES if by == "rank" else STAGES[:1])
        _check_choice("phase", phase, STEP_PHASES)
        return matrix(self._engine(engine), by, stage, window_s, phase).model_dump(mode="json")

    async def hot(
        self, engine: str, limit: int = 20, window_s: float = 60.0, phase: str | None = None
    ) -> list[dict[str, Any]]:
        """HotExpert, hottest first. Raises UnknownEngine, SettingsError."""
        self._tick()
        check_limit(limit)
        _check_window("window_s", window_s)
        _check_choice("phase", phase, STEP_PHASES)
        order = self._journal.desired.placements.get(engine)
        found = hot(self._engine(engine), limit, window_s, order.replicas if order else (), phase)
        return [expert.model_dump(mode="json") for expert in found]

    async def plans(
        self, engine: str | None = None, limit: int = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        """PlanView of sampled plans, newest first. Raises UnknownEngine, SettingsError."""
        self._tick()
        check_limit(limit)
        chosen = [self._engine(engine)] if engine else list(self._windows.engines.values())
        upper = before_id if before_id is not None else 1 << 62
        found = [(kept, each) for each in chosen for kept in each.plans if kept.id < upper]
        found.sort(key=lambda pair: -pair[0].id)
        return [plan_view(each, kept).model_dump(mode="json") for kept, each in found[:limit]]

    async def plan(self, engine: str, id: int) -> dict[str, Any]:
        """PlanView of one sampled plan. Raises UnknownEngine, UnknownPlan."""
        self._tick()
        known = self._engine(engine)
        for kept in known.plans:
            if kept.id == id:
                return plan_view(known, kept).model_dump(mode="json")
        raise UnknownPlan(f"no plan {id} of engine {engine} is kept: only the newest {MOST_PLANS} are", param="id")

    async def decisions(
        self, engine: str | None = None, limit: int = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        """DecisionView, newest first. Raises SettingsError, StoreUnavailable."""
        self._tick()
        check_limit(limit)
        found = self._journal.decisions(limit, engine=engine, before_id=before_id)
        return [decision.model_dump(mode="json") for decision in found]

    async def events(
        self,
        limit: int = 100,
        before_id: int | None = None,
        after_id: int | None = None,
        engine: str | None = None,
        kinds: list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Events, newest first; only those of an engine, of some kinds, where given. Raises StoreUnavailable."""
        self._tick()
        check_limit(limit)
        found = self._journal.events(limit, before_id=before_id, after_id=after_id, engine=engine, kinds=kinds)
        return [event.model_dump(mode="json") for event in found]

    async def status(self) -> dict[str, Any]:
        """SchedulerStatus."""
        self._keep_ticking()
        status = SchedulerStatus(
            version=__version__,
            pid=os.getpid(),
            started_s=self._started_s,
            store_open=not self._journal.problem,
            store_path=str(self._folder),
            store_problem=self._journal.problem,
            desired_revision=self._journal.desired.revision,
            engines=len(self._windows.engines),
            reports_total=self._reports_total,
            reports_refused_total=self._refused.total(),
            reports_refused=dict(self._refused),
            reports_lost=self._windows.lost,
            reports_doubled=self._windows.doubled,
            clock_jumps=self._clock_jumps,
            orders_refused=dict(self._orders_refused),
        )
        return status.model_dump(mode="json")

    async def metrics(self) -> bytes:
        """An encoded SchedulerSnapshot."""
        self._tick()
        engines = tuple(self._snapshot(engine) for _, engine in sorted(self._windows.engines.items()))
        snapshot = SchedulerSnapshot(
            protocol=PROTOCOL,
            time_s=time.time(),
            store_open=not self._journal.problem,
            refused=dict(self._windows.refused),
            engines=engines,
        )
        return encode(snapshot)

    def _snapshot(self, engine: Engine) -> EngineSnapshot:
        name, reports = engine.info.engine, [report for _, report in sorted(engine.reports.items())]
        return EngineSnapshot(
            engine=name,
            state=str(engine.state),
            desired_revision=self._journal.desired.revision_of(name),
            last_seen_s=to_unix_time()(engine.last_seen_s),
            refused=dict(engine.refused),
            speaker=without_experts(reports[0]) if reports else None,
            ranks=tuple(map(rank_snapshot, reports)),
            hot_ratios=tuple(hot_ratios(engine, time.monotonic(), self._interval_s(engine))),
        )


def _check_window(name: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise SettingsError(f"{name}={seconds} is not valid: give seconds above 0", param=name)


def _check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise SettingsError(f"{name}={value!r} is not one of {', '.join(allowed)}", param=name)
