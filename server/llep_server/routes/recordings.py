"""Recordings of counts: order one, look, fetch it, throw it away."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response

from llep.views import RecordingView
from llep_server.depends import AuthorDep, SchedulerDep, note, only_engine
from llep_server.errors import describe
from llep_server.recordings import Downloads
from llep_server.schemas import Page, RecordingOrder, RecordingStop

router = APIRouter(tags=["recordings"])

IdPath = Annotated[str, Path(description="the recording's id", max_length=200)]


@router.post("/recordings", status_code=201, responses=describe(400, 404, 408, 409, 413, 415))
async def start_recording(
    request: Request, scheduler: SchedulerDep, author: AuthorDep, response: Response, body: RecordingOrder
) -> RecordingView:
    """Record an engine's counts for a time, a number of steps or a size, whichever is over first."""
    recording = await scheduler.recording_start(
        body.engine or await only_engine(scheduler, "body"),
        author=author,
        reason=body.reason,
        duration_s=body.duration_s,
        steps=body.steps,
        max_bytes=body.max_bytes,
    )
    response.headers["Location"] = f"/v1/recordings/{recording.id}"
    note(request, engine=recording.engine)
    return recording


@router.get("/recordings")
async def list_recordings(scheduler: SchedulerDep) -> Page[RecordingView]:
    """All that are kept, with their state."""
    return Page(data=await scheduler.recordings())


@router.get("/recordings/{id}", responses=describe(404))
async def get_recording(scheduler: SchedulerDep, id: IdPath) -> RecordingView:
    """One recording."""
    return await scheduler.recording(id)


@router.post("/recordings/{id}/stop", responses=describe(400, 404, 408, 409, 413, 415))
async def stop_recording(
    scheduler: SchedulerDep, author: AuthorDep, id: IdPath, body: RecordingStop | None = None
) -> RecordingView:
    """End a recording now; what has been recorded is kept."""
    return await scheduler.recording_stop(id, author=author)


@router.delete("/recordings/{id}", responses=describe(404, 409))
async def delete_recording(scheduler: SchedulerDep, author: AuthorDep, id: IdPath) -> RecordingView:
    """Throw a recording away."""
    return await scheduler.recording_delete(id, author=author)


@router.get(
    "/recordings/{id}/data",
    response_class=Response,
    responses={
        200: {"content": {"application/x-tar": {}}, "description": "an uncompressed tar of Parquet files"},
        206: {"content": {"application/x-tar": {}}, "description": "the part that Range asks for"},
        **describe(404, 409, 416),
    },
)
async def get_recording_data(
    request: Request,
    id: IdPath,
    range: Annotated[str | None, Header(description="bytes=FIRST-[LAST] or bytes=-LAST_N", max_length=100)] = None,
    if_range: Annotated[
        str | None, Header(description="the ETag that the first part came with", max_length=300)
    ] = None,
) -> Response:
    """The recording, once it has ended; a download that broke off goes on with Range."""
    downloads: Downloads = request.app.state.downloads
    return await downloads.open(id, range, if_range)
