"""The scheduler as the control plane sees it: one call per question, answers as the views of llep/views.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from llep.config import Mode
from llep.errors import SchedulerUnreachable
from llep.messages import SchedulerSnapshot, decode_snapshot
from llep.views import (
    AdviceView,
    DecisionView,
    EngineLoads,
    EngineView,
    Event,
    HistoryPoint,
    HotExpert,
    LoadMatrix,
    PlacementSuggestion,
    PlacementView,
    PlanView,
    RecordingView,
    RevisionView,
    SchedulerStatus,
    SettingsChange,
    SettingsView,
)

T = TypeVar("T")

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # by view: making one takes a millisecond


class Caller(Protocol):
    """Carries a call to the scheduler: llep.scheduler.client.SchedulerClient, or the scheduler itself in a test."""

    async def call(self, method: str, **arguments: Any) -> Any: ...


class Scheduler:
    """Every method raises SchedulerUnreachable where there is no answer, and what the scheduler itself raises."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def _ask(self, view: type[T], method: str, **arguments: Any) -> T:
        if view not in _ADAPTERS:
            _ADAPTERS[view] = TypeAdapter(view)
        answer = await self._caller.call(method, **arguments)
        try:
            found: T = _ADAPTERS[view].validate_python(answer)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unreadable(f"{method}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return found

    async def status(self) -> SchedulerStatus:
        return await self._ask(SchedulerStatus, "status")

    async def engines(self) -> list[EngineView]:
        return await self._ask(list[EngineView], "engines")

    # Settings.

    async def settings(self, engine: str | None) -> SettingsView:
        return await self._ask(SettingsView, "settings", engine=engine)

    async def revisions(self, limit: int, before: int | None) -> list[RevisionView]:
        """Newest first; only those below number `before` where one is given."""
        return await self._ask(list[RevisionView], "revisions", limit=limit, before=before)

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
        return await self._ask(
            SettingsChange,
            "patch_settings",
            patch=patch,
            author=author,
            reason=reason,
            engines=engines,
            if_revision=if_revision,
            dry_run=dry_run,
        )

    async def rollback(
        self, revision: int, *, author: str, reason: str, if_revision: int | None, dry_run: bool
    ) -> SettingsChange:
        return await self._ask(
            SettingsChange,
            "rollback",
            revision=revision,
            author=author,
            reason=reason,
            if_revision=if_revision,
            dry_run=dry_run,
        )

    async def set_mode(
        self, mode: Mode, *, ttl_s: float | None, author: str, reason: str, engines: list[str] | None
    ) -> SettingsChange:
        return await self._ask(
            SettingsChange, "set_mode", mode=str(mode), ttl_s=ttl_s, author=author, reason=reason, engines=engines
        )

    # Loads and plans.

    async def loads(self, window_s: float, engine: str | None, phase: str | None = None) -> list[EngineLoads]:
        of_phase = {"phase": phase} if phase else {}
        return await self._ask(list[EngineLoads], "loads", window_s=window_s, engine=engine, **of_phase)

    async def history(
        self, engine: str, window_s: float, step_s: float, phase: str | None = None
    ) -> list[HistoryPoint]:
        of_phase = {"phase": phase} if phase else {}
        return await self._ask(
            list[HistoryPoint], "history", engine=engine, window_s=window_s, step_s=step_s, **of_phase
        )

    async def matrix(self, engine: str, by: str, stage: str, window_s: float, phase: str | None) -> LoadMatrix:
        return await self._ask(LoadMatrix, "matrix", engine=engine, by=by, stage=stage, window_s=window_s, phase=phase)

    async def hot(self, engine: str, limit: int, window_s: float, phase: str | None = None) -> list[HotExpert]:
        of_phase = {"phase": phase} if phase else {}
        return await self._ask(list[HotExpert], "hot", engine=engine, limit=limit, window_s=window_s, **of_phase)

    async def plans(self, engine: str | None, limit: int, before_id: int | None) -> list[PlanView]:
        return await self._ask(list[PlanView], "plans", engine=engine, limit=limit, before_id=before_id)

    async def plan(self, engine: str, id: int) -> PlanView:
        return await self._ask(PlanView, "plan", engine=engine, id=id)

    # Placement, advice, decisions.

    async def placement(self, engine: str | None) -> list[PlacementView]:
        return await self._ask(list[PlacementView], "placement", engine=engine)

    async def placement_suggest(self, engine: str) -> PlacementSuggestion:
        return await self._ask(PlacementSuggestion, "placement_suggest", engine=engine)

    async def placement_apply(
        self, engine: str, *, author: str, reason: str, replicas: list[dict[str, int]] | None, dry_run: bool
    ) -> PlacementView:
        return await self._ask(
            PlacementView,
            "placement_apply",
            engine=engine,
            author=author,
            reason=reason,
            replicas=replicas,
            dry_run=dry_run,
        )

    async def placement_rollback(self, engine: str, *, author: str, reason: str) -> PlacementView:
        return await self._ask(PlacementView, "placement_rollback", engine=engine, author=author, reason=reason)

    async def advice(self, engine: str | None) -> list[AdviceView]:
        return await self._ask(list[AdviceView], "advice", engine=engine)

    async def decisions(self, engine: str | None, limit: int, before_id: int | None) -> list[DecisionView]:
        return await self._ask(list[DecisionView], "decisions", engine=engine, limit=limit, before_id=before_id)

    # Recordings.

    async def recordings(self) -> list[RecordingView]:
        return await self._ask(list[RecordingView], "recordings")

    async def recording(self, id: str) -> RecordingView:
        return await self._ask(RecordingView, "recording", id=id)

    async def recording_start(
        self,
        engine: str,
        *,
        author: str,
        reason: str,
        duration_s: float | None,
        steps: int | None,
        max_bytes: int | None,
    ) -> RecordingView:
        return await self._ask(
            RecordingView,
            "recording_start",
            engine=engine,
            author=author,
            duration_s=duration_s,
            steps=steps,
            max_bytes=max_bytes,
            reason=reason,
        )

    async def recording_stop(self, id: str, *, author: str) -> RecordingView:
        return await self._ask(RecordingView, "recording_stop", id=id, author=author)

    async def recording_delete(self, id: str, *, author: str) -> RecordingView:
        return await self._ask(RecordingView, "recording_delete", id=id, author=author)

    async def recording_read(self, id: str, offset: int, size: int) -> bytes:
        return await self._ask(bytes, "recording_read", id=id, offset=offset, size=size)

    # The rest.

    async def events(
        self,
        limit: int,
        before_id: int | None,
        *,
        engine: str | None = None,
        kinds: Sequence[str] | None = None,
    ) -> list[Event]:
        """Newest first; only those older than event `before_id`, of an engine, of some kinds, where given."""
        return await self._ask(
            list[Event], "events", limit=limit, before_id=before_id, engine=engine, kinds=kinds and list(kinds)
        )

    async def snapshot(self) -> SchedulerSnapshot:
        """All that /metrics needs."""
        try:
            return await asyncio.to_thread(decode_snapshot, await self._caller.call("metrics"))
        except ValueError as error:
            raise _unreadable(str(error)) from None


def _unreadable(why: str) -> SchedulerUnreachable:
    """The scheduler outlives an upgrade of the control plane."""
    return SchedulerUnreachable(
        f"the scheduler's answer can't be read ({why}): run control plane and scheduler in the same version"
    )
