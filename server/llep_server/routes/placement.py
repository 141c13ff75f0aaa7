"""Resident replicas: what there is, what the scheduler would do, do it, take it back."""

from __future__ import annotations

from fastapi import APIRouter, Request

from llep.views import PlacementSuggestion, PlacementView
from llep_server.depends import AuthorDep, EngineQuery, OneEngineQuery, SchedulerDep, note, only_engine
from llep_server.errors import describe
from llep_server.schemas import Page, PlacementChange, PlacementRollback

router = APIRouter(tags=["placement"])


@router.get("/placement", responses=describe(404))
async def get_placement(scheduler: SchedulerDep, engine: EngineQuery = None) -> Page[PlacementView]:
    """Resident replicas of each engine: asked for, filled, live, and the room there is."""
    return Page(data=await scheduler.placement(engine))


@router.post("/placement/suggest", responses=describe(404))
async def suggest_placement(scheduler: SchedulerDep, engine: OneEngineQuery = None) -> PlacementSuggestion:
    """What the scheduler would do now, and what it is worth. Changes nothing."""
    return await scheduler.placement_suggest(engine or await only_engine(scheduler))


@router.post("/placement/apply", responses=describe(400, 404, 408, 413, 415))
async def apply_placement(
    request: Request, scheduler: SchedulerDep, author: AuthorDep, body: PlacementChange
) -> PlacementView:
    """Order resident replicas: those given, or else the suggestion's. Ranks fill them between steps, then use them."""
    engine = body.engine or await only_engine(scheduler, "body")
    view = await scheduler.placement_apply(
        engine,
        author=author,
        reason=body.reason,
        replicas=None if body.replicas is None else [copy.model_dump() for copy in body.replicas],
        dry_run=body.dry_run,
    )
    note(request, engine=engine, revision=view.number)
    return view


@router.post("/placement/rollback", responses=describe(400, 404, 408, 413, 415))
async def rollback_placement(
    request: Request, scheduler: SchedulerDep, author: AuthorDep, body: PlacementRollback
) -> PlacementView:
    """Go back to the placement before the present one."""
    engine = body.engine or await only_engine(scheduler, "body")
    view = await scheduler.placement_rollback(engine, author=author, reason=body.reason)
    note(request, engine=engine, revision=view.number)
    return view
