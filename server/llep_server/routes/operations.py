"""Long jobs: start them, watch them, cancel them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from llep_server.depends import AuthorDep, note
from llep_server.errors import describe
from llep_server.operations import Operations
from llep_server.schemas import Operation, Page, TuningOrder

router = APIRouter(tags=["operations"])

IdPath = Annotated[str, Path(description="the operation's id", max_length=200)]


@router.post("/tuning", status_code=202, responses=describe(400, 404, 408, 409, 413, 415))
async def start_tuning(request: Request, author: AuthorDep, response: Response, body: TuningOrder) -> Operation:
    """Sweep settings over a recording with the simulator: an operation whose result ranks them by predicted seconds,
    with the patch to apply.
    """
    operations: Operations = request.app.state.operations
    operation = await operations.start_tuning(body, author)
    response.headers["Location"] = f"/v1/operations/{operation.id}"
    note(request, operation=operation.id)
    return operation


@router.get("/operations")
async def list_operations(request: Request) -> Page[Operation]:
    """The newest operations, newest first, without their results."""
    operations: Operations = request.app.state.operations
    return Page(data=operations.all())


@router.get("/operations/{id}", responses=describe(404))
async def get_operation(request: Request, id: IdPath) -> Operation:
    """How far an operation is, and its result."""
    operations: Operations = request.app.state.operations
    return operations.get(id)


@router.delete("/operations/{id}", responses=describe(404))
async def delete_operation(request: Request, id: IdPath) -> Operation:
    """Cancel an operation that has not ended; forget one that has."""
    operations: Operations = request.app.state.operations
    return await operations.delete(id)
