"""The routes: a line or two each, between HTTP and the scheduler."""

from __future__ import annotations

import platform
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer

from llep import __version__
from llep.config import Settings
from llep.errors import UnknownEngine
from llep.views import EngineLoads, EngineView, Event, SettingsChange, SettingsView
from llep_server import docs, readiness
from llep_server.errors import InvalidRequest, NotReady, describe, error_body, json_response, unknown_name
from llep_server.keys import KeyRing
from llep_server.metrics import Exposition
from llep_server.middleware import author_of
from llep_server.scheduler import Scheduler
from llep_server.schemas import Health, Live, ModeChange, Page, Readiness, Unready, Version, settings_patch_schema

MAX_WINDOW_S = 3600.0
MAX_EVENTS = 500


def _scheduler(request: Request) -> Scheduler:
    scheduler: Scheduler = request.app.state.scheduler
    return scheduler


def _refuse_unknown_query(request: Request) -> None:
    # A mistyped ?dry_run must not change anything.
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(unknown_name("query parameter", name, known), param=name)


SchedulerDep = Annotated[Scheduler, Depends(_scheduler)]
EngineQuery = Annotated[str | None, Query(description="only this engine", max_length=200)]
EnginesQuery = Annotated[
    list[str] | None, Query(description="only these engines (repeat it); without it all, also those still to come")
]
ReasonQuery = Annotated[str, Query(description="why, for the audit trail", max_length=500)]
# Only so that the API's description shows it; middleware.Gate does the checking, before anything is parsed.
bearer = HTTPBearer(auto_error=False, description="A key of the control plane's keys file.")

ops = APIRouter(tags=["operations"])
scrape = APIRouter(tags=["operations"], responses=describe(401))
v1 = APIRouter(
    prefix="/v1",
    tags=["v1"],
    dependencies=[Depends(_refuse_unknown_query)],
    responses=describe(401, 403, 422, 503),
)


@ops.get("/docs", include_in_schema=False)
async def documentation(request: Request) -> HTMLResponse:
    page = docs.page(request.app.openapi(), str(request.base_url).rstrip("/"))
    return HTMLResponse(page, headers={"Content-Security-Policy": docs.CONTENT_SECURITY_POLICY})


@ops.get("/livez")
async def livez() -> Live:
    """The control plane's process answers. Nothing else is asked."""
    return Live()


@ops.get("/readyz", response_model=Readiness, responses={503: {"model": Unready}})
async def readyz(request: Request, scheduler: SchedulerDep) -> Response:
    """Store open, scheduler reached, at least one fresh engine, and its ranks hold the desired revision; else 503."""
    checks = await readiness.check(scheduler)
    body: dict[str, Any] = {"ready": all(check.ok for check in checks), "checks": [c.model_dump() for c in checks]}
    if body["ready"]:
        return json_response(body, 200)
    missing = "; ".join(f"{check.name}: {check.message}" for check in checks if not check.ok)
    return json_response(error_body(request.scope, 503, f"not ready: {missing}", NotReady.code) | body, 503)


@ops.get("/health")
async def health(request: Request, scheduler: SchedulerDep) -> Health:
    """What works and what does not, for people; always 200. For machines: /livez and /readyz."""
    checks = await readiness.check(scheduler)
    keys: KeyRing | None = request.app.state.keys
    keys_state = "open" if keys is None else keys.problem or "ok"
    is_ok = all(check.ok for check in checks) and keys_state in ("open", "ok")
    return Health(status="ok" if is_ok else "degraded", version=__version__, checks=checks, keys=keys_state)


@ops.get("/version")
async def version() -> Version:
    return Version(version=__version__, python=platform.python_version())


@scrape.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus or OpenMetrics text"}},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics of all engines. Goes on without a scheduler, with llep_scheduler_up 0."""
    exposition: Exposition = request.app.state.exposition
    page, content_type = await exposition.page(request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": content_type})


@v1.get("/engines")
async def list_engines(scheduler: SchedulerDep) -> Page[EngineView]:
    """Every engine that has reported, with its ranks, layout, mode and revisions."""
    return Page(data=await scheduler.engines())


@v1.get("/engines/{engine:path}", responses=describe(404))
async def get_engine(
    scheduler: SchedulerDep, engine: Annotated[str, Path(description="the engine's id")]
) -> EngineView:
    """One engine."""
    engines = {view.id: view for view in await scheduler.engines()}
    if engine not in engines:
        raise UnknownEngine(unknown_name("engine", engine, engines), param="engine")
    return engines[engine]


@v1.get("/settings", responses=describe(404))
async def get_settings(scheduler: SchedulerDep, response: Response, engine: EngineQuery = None) -> SettingsView:
    """Effective settings, where each comes from, whether it can change while serving, and the revision as ETag."""
    view = await scheduler.settings(engine)
    response.headers["ETag"] = f'"{view.revision}"'
    return view


@v1.get("/settings/schema")
async def get_settings_schema() -> dict[str, Any]:
    """JSON Schema of the settings: types, ranges, defaults, and `hot` where a key can change while serving."""
    return Settings.model_json_schema()


@v1.patch(
    "/settings",
    responses=describe(400, 404, 412, 413, 415),
    openapi_extra={"requestBody": {"content": {"application/merge-patch+json": {"schema": settings_patch_schema()}}}},
)
async def patch_settings(
    request: Request,
    response: Response,
    scheduler: SchedulerDep,
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
    if_match: Annotated[
        str | None,
        Header(
            description="the ETag that was read: 412 if somebody was faster",
            json_schema_extra={"pattern": r'^(\*|(W/)?"[0-9]{1,18}")$'},
        ),
    ] = None,
) -> SettingsChange:
    """Change settings, all or nothing. Answers the new revision, what it changes, and where it is applied by now."""
    Settings().changed(patch)  # what no engine would take needs no way to the scheduler
    change = await scheduler.patch_settings(
        patch,
        author=author_of(request.scope),
        reason=reason,
        engines=engines,
        if_revision=_parse_if_match(if_match),
        dry_run=dry_run,
    )
    response.headers["ETag"] = f'"{change.revision}"'
    return change


@v1.put("/mode", responses=describe(400, 404, 413, 415))
async def put_mode(
    request: Request,
    scheduler: SchedulerDep,
    change: ModeChange,
    engines: EnginesQuery = None,
    reason: ReasonQuery = "",
) -> SettingsChange:
    """Switch the mode; with ttl_s it goes back by itself."""
    author = author_of(request.scope)
    return await scheduler.set_mode(change.mode, ttl_s=change.ttl_s, author=author, reason=reason, engines=engines)


@v1.get("/loads", responses=describe(404))
async def get_loads(
    scheduler: SchedulerDep,
    window_s: Annotated[float, Query(ge=1, le=MAX_WINDOW_S, allow_inf_nan=False, description="seconds back")] = 60,
    engine: EngineQuery = None,
) -> Page[EngineLoads]:
    """Per engine and rank over the window: pairs routed and computed, imbalance before and after, lends, memory."""
    return Page(data=await scheduler.loads(window_s, engine))


@v1.get("/events")
async def list_events(
    scheduler: SchedulerDep,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 50,
    cursor: Annotated[int | None, Query(ge=1, le=2**62, description="next_cursor of the page before")] = None,
) -> Page[Event]:
    """The audit trail, newest first: settings, modes, engines coming and going, failures."""
    events = await scheduler.events(limit + 1, cursor)
    has_more = len(events) > limit
    return Page(data=events[:limit], has_more=has_more, next_cursor=str(events[limit - 1].id) if has_more else None)


def _parse_if_match(value: str | None) -> int | None:
    if value is None or value.strip() == "*":
        return None
    revision = value.strip().removeprefix("W/").strip('"')
    if not (revision.isascii() and revision.isdecimal()) or len(revision) > 18:
        raise InvalidRequest(
            f'If-Match={value!r} is not a revision: send the ETag of GET /v1/settings, such as "3"', param="If-Match"
        )
    return int(revision)
