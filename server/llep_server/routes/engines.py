"""Engines as they report, and what the scheduler makes of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from llep.views import AdviceView, DecisionView, EngineView
from llep_server.depends import CursorQuery, EngineQuery, LimitQuery, SchedulerDep, find_engine, page_of
from llep_server.errors import describe
from llep_server.schemas import Page

router = APIRouter(tags=["engines"])


@router.get("/engines")
async def list_engines(scheduler: SchedulerDep) -> Page[EngineView]:
    """Every engine that has reported, with its ranks, layout, mode and revisions."""
    return Page(data=await scheduler.engines())


@router.get("/engines/{engine:path}", responses=describe(404))
async def get_engine(
    scheduler: SchedulerDep, engine: Annotated[str, Path(description="the engine's id")]
) -> EngineView:
    """One engine."""
    return await find_engine(scheduler, engine)


@router.get("/advice", responses=describe(404))
async def list_advice(scheduler: SchedulerDep, engine: EngineQuery = None) -> Page[AdviceView]:
    """Whether balancing is worth it on each engine, on what evidence, and the change of settings that is proposed."""
    return Page(data=await scheduler.advice(engine))


@router.get("/decisions", responses=describe(404))
async def list_decisions(
    scheduler: SchedulerDep, engine: EngineQuery = None, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[DecisionView]:
    """What the scheduler decided, newest first, also to do nothing: why, on which numbers, which revision it made."""
    return page_of(await scheduler.decisions(engine, limit + 1, cursor), limit, lambda decision: decision.id)
