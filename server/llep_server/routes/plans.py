"""Plans: those that engines sampled, and those that they would make."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from llep.views import PlanView
from llep_server.depends import (
    MAX_ID,
    CursorQuery,
    EngineQuery,
    LimitQuery,
    OneEngineQuery,
    SchedulerDep,
    only_engine,
    page_of,
)
from llep_server.errors import describe, require_json
from llep_server.schemas import Page, Simulation
from llep_server.simulation import Simulator, simulation_schema

router = APIRouter(tags=["plans"])


@router.get("/plans", responses=describe(404))
async def list_plans(
    scheduler: SchedulerDep, engine: EngineQuery = None, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[PlanView]:
    """Sampled layer-steps that lent, newest first: loads before and after, lends, bytes, times."""
    return page_of(await scheduler.plans(engine, limit + 1, cursor), limit, lambda plan: plan.id)


@router.get("/plans/{id}", responses=describe(404))
async def get_plan(
    scheduler: SchedulerDep,
    id: Annotated[int, Path(ge=0, le=MAX_ID, description="the plan's id")],
    engine: OneEngineQuery = None,
) -> PlanView:
    """One sampled layer-step of an engine."""
    return await scheduler.plan(engine or await only_engine(scheduler), id)


@router.post(
    "/plans/simulate",
    responses=describe(400, 404, 408, 409, 413, 415, 504),
    response_model=Simulation,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": simulation_schema()}}}},
)
async def simulate_plan(request: Request) -> Response:
    """Plan one batch, or replay a recording: imbalance before and after, lends, bytes, peak memory. Needs no GPU.

    Give either `tokens`, pairs of each rank for each expert, as `llep plan simulate` takes them, or `recording` with
    the `settings` to replay it under. Takes bodies up to 16 MiB, 4096 ranks and 65536 experts.
    """
    require_json(request)
    simulator: Simulator = request.app.state.simulator
    return Response(await simulator.run(await request.body()), media_type="application/json")
