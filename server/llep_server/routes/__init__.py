"""The routes: a line or two each, between HTTP and the scheduler. One module per thing people ask about."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from llep_server.depends import refuse_unknown_query
from llep_server.errors import describe
from llep_server.routes import engines, events, loads, operations, ops, placement, plans, recordings, settings

__all__ = ["ops", "v1"]

v1 = APIRouter(
    prefix="/v1",
    dependencies=[Depends(refuse_unknown_query)],
    responses=describe(401, 403, 422, 429, 503),
)
for module in (engines, settings, loads, plans, placement, recordings, operations, events):
    v1.include_router(module.router)
