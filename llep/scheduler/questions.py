"""The part of the Scheduler that answers questions."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from llep import __version__
from llep.errors import SettingsError
from llep.messages import PROTOCOL, EngineSnapshot, SchedulerSnapshot, encode
from llep.scheduler.core import Core, check_limit, to_unix_time
from llep.scheduler.show import engine_view, settings_view
from llep.scheduler.windows import loads
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

    async def loads(self, window_s: float = 10.0, engine: str | None = None) -> list[dict[str, Any]]:
        """EngineLoads of one engine or all. Raises UnknownEngine, SettingsError for an impossible window."""
        self._tick()
        if not (math.isfinite(window_s) and window_s > 0):
            raise SettingsError(f"window_s={window_s} is not valid: give seconds above 0", param="window_s")
        chosen = [self._engine(engine)] if engine else [e for _, e in sorted(self._windows.engines.items())]
        now_s = time.monotonic()
        return [loads(e, window_s, now_s, self._interval_s(e)).model_dump(mode="json") for e in chosen]

    async def events(
        self, limit: int = 100, before_id: int | None = None, after_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Events, newest first. Raises StoreUnavailable."""
        self._tick()
        check_limit(limit)
        found = self._journal.events(limit, before_id=before_id, after_id=after_id)
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
        )
        return status.model_dump(mode="json")

    async def metrics(self) -> bytes:
        """An encoded SchedulerSnapshot."""
        self._tick()
        unix_time = to_unix_time()
        engines = tuple(
            EngineSnapshot(
                engine=name,
                state=str(engine.state),
                desired_revision=self._journal.desired.revision_of(name),
                last_seen_s=unix_time(engine.last_seen_s),
                refused=dict(engine.refused),
                reports=engine.reports,
            )
            for name, engine in sorted(self._windows.engines.items())
        )
        store_open = not self._journal.problem
        return encode(SchedulerSnapshot(protocol=PROTOCOL, time_s=time.time(), store_open=store_open, engines=engines))
