"""Loads: now, back in time, by layer, the hottest experts, and as a stream."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from llep.errors import SchedulerUnreachable
from llep.views import EngineLoads, HistoryPoint, HotExpert, LoadMatrix
from llep_server import tables
from llep_server.depends import EngineQuery, OneEngineQuery, SchedulerDep, WindowQuery, find_engine, only_engine
from llep_server.errors import describe
from llep_server.keys import KeyRing, sent_key
from llep_server.schemas import Page
from llep_server.stream import MAX_EVENT_ID, Broadcast, EventStream

router = APIRouter(tags=["loads"])

PhaseQuery = Annotated[
    Literal["prefill", "decode"] | None, Query(description="only these steps; without it those of both phases")
]


@router.get("/loads", responses=describe(404))
async def get_loads(
    scheduler: SchedulerDep, window_s: WindowQuery = 60, engine: EngineQuery = None, phase: PhaseQuery = None
) -> Page[EngineLoads]:
    """Per engine and rank over the window: pairs routed and computed, imbalance before and after, lends, memory, and
    what lending was measured to be worth.
    """
    return Page(data=await scheduler.loads(window_s, engine, phase))


@router.get("/loads/history", responses=describe(404))
async def get_history(
    scheduler: SchedulerDep,
    engine: OneEngineQuery = None,
    window_s: WindowQuery = 900,
    step_s: Annotated[float, Query(ge=1, le=600, allow_inf_nan=False, description="seconds between points")] = 10,
    phase: PhaseQuery = None,
) -> Page[HistoryPoint]:
    """Loads of one engine back in time, oldest first: a point per step_s."""
    return Page(data=await scheduler.history(engine or await only_engine(scheduler), window_s, step_s, phase))


@router.get(
    "/loads/matrix",
    response_model=LoadMatrix,
    responses={**tables.RESPONSES, **describe(404)},
)
async def get_matrix(
    scheduler: SchedulerDep,
    engine: OneEngineQuery = None,
    by: Annotated[Literal["rank", "expert"], Query(description="what the columns are")] = "rank",
    stage: Annotated[
        Literal["before", "after"],
        Query(description="pairs as plain EP would compute them, or as computed; experts have before only"),
    ] = "before",
    window_s: WindowQuery = 60,
    phase: PhaseQuery = None,
    format: Annotated[tables.Format, Query(description="csv and parquet: a row per layer and column")] = "json",
) -> Response:
    """Pairs by layer and rank or expert over the window: layers x N."""
    matrix = await scheduler.matrix(engine or await only_engine(scheduler), by, stage, window_s, phase)
    return await tables.respond(matrix, format)


@router.get("/loads/hot", responses=describe(404))
async def get_hot(
    scheduler: SchedulerDep,
    engine: OneEngineQuery = None,
    limit: Annotated[int, Query(ge=1, le=500, description="how many")] = 10,
    window_s: WindowQuery = 60,
    phase: PhaseQuery = None,
) -> Page[HotExpert]:
    """The hottest experts: layer, share of its pairs, home rank, replicas, and for how long it has been hot."""
    return Page(data=await scheduler.hot(engine or await only_engine(scheduler), limit, window_s, phase))


@router.get(
    "/loads/stream",
    response_class=Response,
    response_model=None,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "server-sent events, until you go"},
        **describe(404),
    },
)
async def stream_loads(
    request: Request,
    scheduler: SchedulerDep,
    engine: EngineQuery = None,
    last_event_id: Annotated[
        str | None, Header(description="go on after this event, if it is not too long ago", max_length=MAX_EVENT_ID)
    ] = None,
) -> EventStream:
    """Server-sent events, one a second: `loads` with {time_s, loads} over the last 10 s, `problem` with the error
    while the scheduler does not answer, `missed` where Last-Event-ID is too long ago to go on from.
    """
    broadcast: Broadcast = request.app.state.broadcast
    keys: KeyRing | None = request.app.state.keys
    if engine is not None:
        with suppress(SchedulerUnreachable):  # which the stream itself will say, until it is back
            await find_engine(scheduler, engine)
    return broadcast.open(
        engine, last_event_id, lambda: keys is None or keys.find(sent_key(request.headers)) is not None
    )
