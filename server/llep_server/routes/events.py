"""The audit trail."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from llep.views import Event, EventKind
from llep_server.depends import CursorQuery, EngineQuery, LimitQuery, SchedulerDep, page_of
from llep_server.schemas import Page

router = APIRouter(tags=["events"])


@router.get("/events")
async def list_events(
    scheduler: SchedulerDep,
    engine: EngineQuery = None,
    kind: Annotated[list[EventKind] | None, Query(description="only these kinds (repeat it)")] = None,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
) -> Page[Event]:
    """The audit trail, newest first: settings, modes, placements, engines coming and going, failures."""
    events = await scheduler.events(limit + 1, cursor, engine=engine, kinds=kind)
    return page_of(events, limit, lambda event: event.id)
