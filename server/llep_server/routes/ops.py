"""Probes, /metrics and the description of all this."""

from __future__ import annotations

import platform
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from llep import __version__
from llep_server import docs, readiness
from llep_server.depends import SchedulerDep
from llep_server.errors import NotReady, describe, error_body, json_response
from llep_server.keys import KeyRing
from llep_server.metrics import Exposition
from llep_server.schemas import Health, Live, Readiness, Unready, Version

MOST_DOCS_PAGES = 8

router = APIRouter(tags=["operations"], responses=describe(403))
scrape = APIRouter(tags=["operations"], responses=describe(401, 403, 429))


@router.get("/docs", include_in_schema=False)
async def documentation(request: Request) -> HTMLResponse:
    pages: dict[str, str] = request.app.state.docs_pages
    base_url = str(request.base_url).rstrip("/")
    if base_url not in pages:
        if len(pages) >= MOST_DOCS_PAGES:  # Host can be anything
            pages.clear()
        pages[base_url] = docs.page(request.app.openapi(), base_url)
    return HTMLResponse(pages[base_url], headers={"Content-Security-Policy": docs.CONTENT_SECURITY_POLICY})


@router.get("/livez")
async def livez() -> Live:
    """The control plane's process answers. Nothing else is asked."""
    return Live()


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Unready}})
async def readyz(request: Request, scheduler: SchedulerDep) -> Response:
    """Store open, scheduler reached, at least one fresh engine, and its ranks hold the desired revision; else 503."""
    checks = await readiness.check(scheduler)
    body: dict[str, Any] = {"ready": all(check.ok for check in checks), "checks": [c.model_dump() for c in checks]}
    if body["ready"]:
        return json_response(body, 200)
    missing = "; ".join(f"{check.name}: {check.message}" for check in checks if not check.ok)
    return json_response(error_body(request.scope, 503, f"not ready: {missing}", NotReady.code) | body, 503)


@router.get("/health")
async def health(request: Request, scheduler: SchedulerDep) -> Health:
    """What works and what does not, for people; always 200. For machines: /livez and /readyz."""
    checks = await readiness.check(scheduler)
    keys: KeyRing | None = request.app.state.keys
    keys_state = "open" if keys is None else keys.problem or "ok"
    is_ok = all(check.ok for check in checks) and keys_state in ("open", "ok")
    return Health(status="ok" if is_ok else "degraded", version=__version__, checks=checks, keys=keys_state)


@router.get("/version")
async def version() -> Version:
    """Versions of llep and of Python here."""
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
