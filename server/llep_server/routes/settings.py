"""Settings and modes: read, change, look back, take back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response

from llep.config import Settings
from llep.views import RevisionView, SettingsChange, SettingsView
from llep_server.depends import (
    AuthorDep,
    CursorQuery,
    EngineQuery,
    EnginesQuery,
    IfMatchHeader,
    LimitQuery,
    ReasonQuery,
    SchedulerDep,
    note,
    page_of,
    parse_if_match,
)
from llep_server.errors import InvalidRequest, describe
from llep_server.schemas import ModeChange, Page, Rollback, settings_patch_schema

router = APIRouter(tags=["settings"])


@router.get("/settings", responses=describe(404))
async def get_settings(scheduler: SchedulerDep, response: Response, engine: EngineQuery = None) -> SettingsView:
    """Effective settings, where each comes from, whether it can change while serving, and the revision as ETag."""
    view = await scheduler.settings(engine)
    response.headers["ETag"] = f'"{view.revision}"'
    return view


@router.get("/settings/schema")
async def get_settings_schema() -> dict[str, Any]:
    """JSON Schema of the settings: types, ranges, defaults, and `hot` where a key can change while serving."""
    return Settings.model_json_schema()


@router.get("/settings/revisions")
async def list_revisions(
    scheduler: SchedulerDep, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[RevisionView]:
    """Every change, newest first: who, when, why, on which engines, and what it changed."""
    return page_of(await scheduler.revisions(limit + 1, cursor), limit, lambda revision: revision.number)


@router.post("/settings/rollback", responses=describe(400, 404, 408, 412, 413, 415))
async def rollback(
    request: Request,
    scheduler: SchedulerDep,
    author: AuthorDep,
    response: Response,
    body: Rollback,
    if_match: IfMatchHeader = None,
) -> SettingsChange:
    """Put the settings of all engines back to what they were under a revision; that makes a new revision."""
    change = await scheduler.rollback(
        body.revision,
        author=author,
        reason=body.reason,
        if_revision=parse_if_match(if_match),
        dry_run=body.dry_run,
    )
    return _answer(request, response, change)


@router.patch(
    "/settings",
    responses=describe(400, 404, 408, 412, 413, 415),
    openapi_extra={"requestBody": {"content": {"application/merge-patch+json": {"schema": settings_patch_schema()}}}},
)
async def patch_settings(
    request: Request,
    scheduler: SchedulerDep,
    author: AuthorDep,
    response: Response,
    patch: Annotated[
        dict[str, Any],
        Body(
            media_type="application/merge-patch+json",
            description="the keys to change; null puts a key back to what it was at the engine's start",
        ),
    ],
    engines: EnginesQuery = None,
    reason: ReasonQuery = "",
    dry_run: Annotated[bool, Query(description="say what would change, change nothing")] = False,
    if_match: IfMatchHeader = None,
) -> SettingsChange:
    """Change settings, all or nothing. Answers the new revision, what it changes, and where it is applied by now."""
    Settings().changed(patch)  # what no engine would take needs no way to the scheduler
    change = await scheduler.patch_settings(
        patch,
        author=author,
        reason=reason,
        engines=engines,
        if_revision=parse_if_match(if_match),
        dry_run=dry_run,
    )
    return _answer(request, response, change)


@router.put("/mode", responses=describe(400, 404, 408, 413, 415))
async def put_mode(
    request: Request,
    response: Response,
    scheduler: SchedulerDep,
    author: AuthorDep,
    change: ModeChange,
    engines: EnginesQuery = None,
    reason: ReasonQuery = "",
    if_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> SettingsChange:
    """Switch the mode; with ttl_s it goes back by itself. PATCH /v1/settings takes a mode too, with If-Match."""
    if parse_if_match(if_match) is not None:
        raise InvalidRequest(
            "PUT /v1/mode can't say if somebody was faster: leave out If-Match, or PATCH /v1/settings with the mode",
            param="If-Match",
        )
    made = await scheduler.set_mode(change.mode, ttl_s=change.ttl_s, author=author, reason=reason, engines=engines)
    return _answer(request, response, made)


def _answer(request: Request, response: Response, change: SettingsChange) -> SettingsChange:
    response.headers["ETag"] = f'"{change.revision}"'
    note(request, revision=change.revision, engine=",".join(change.engines or ["all"]))
    return change
