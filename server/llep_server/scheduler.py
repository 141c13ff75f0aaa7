"""The scheduler as the control plane sees it: one call per question, answers as the views of llep/views.py."""

from __future__ import annotations

from typing import Any, Protocol

from llep.config import Mode
from llep.errors import SchedulerUnreachable
from llep.messages import SchedulerSnapshot, decode_snapshot
from llep.views import EngineLoads, EngineView, Event, SchedulerStatus, SettingsChange, SettingsView


class Caller(Protocol):
    """Carries a call to the scheduler: llep.scheduler.client.SchedulerClient, or the scheduler itself in a test."""

    async def call(self, method: str, **arguments: Any) -> Any: ...


class Scheduler:
    """Every method raises SchedulerUnreachable where there is no answer, and what the scheduler itself raises."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def status(self) -> SchedulerStatus:
        return SchedulerStatus.model_validate(await self._caller.call("status"))

    async def engines(self) -> list[EngineView]:
        return [EngineView.model_validate(engine) for engine in await self._caller.call("engines")]

    async def settings(self, engine: str | None) -> SettingsView:
        return SettingsView.model_validate(await self._caller.call("settings", engine=engine))

    async def patch_settings(
        self,
        patch: dict[str, Any],
        *,
        author: str,
        reason: str,
        engines: list[str] | None,
        if_revision: int | None,
        dry_run: bool,
    ) -> SettingsChange:
        answer = await self._caller.call(
            "patch_settings",
            patch=patch,
            author=author,
            reason=reason,
            engines=engines,
            if_revision=if_revision,
            dry_run=dry_run,
        )
        return SettingsChange.model_validate(answer)

    async def set_mode(
        self, mode: Mode, *, ttl_s: float | None, author: str, reason: str, engines: list[str] | None
    ) -> SettingsChange:
        answer = await self._caller.call(
            "set_mode", mode=str(mode), ttl_s=ttl_s, author=author, reason=reason, engines=engines
        )
        return SettingsChange.model_validate(answer)

    async def loads(self, window_s: float, engine: str | None) -> list[EngineLoads]:
        answer = await self._caller.call("loads", window_s=window_s, engine=engine)
        return [EngineLoads.model_validate(loads) for loads in answer]

    async def events(self, limit: int, before_id: int | None) -> list[Event]:
        """Newest first; only those older than event `before_id` where one is given."""
        answer = await self._caller.call("events", limit=limit, before_id=before_id)
        return [Event.model_validate(event) for event in answer]

    async def snapshot(self) -> SchedulerSnapshot:
        """All that /metrics needs."""
        try:
            return decode_snapshot(await self._caller.call("metrics"))
        except ValueError as error:
            raise SchedulerUnreachable(
                f"the scheduler's answer can't be read ({error}): run control plane and scheduler in the same version"
            ) from None
