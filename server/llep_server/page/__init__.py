"""The page at /: one HTML document made here, its script and stylesheet from static/, nothing from another host."""

from __future__ import annotations

import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse

from llep import __version__
from llep_server.page.forms import engine_settings, mode_options

# Beneath it come a digest of all assets and an asset's name: what a browser has kept is never another version's.
ASSETS_PATH = "/static/"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
MEDIA_TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> HTMLResponse:
    return HTMLResponse(render(needs_key=request.app.state.keys is not None), headers=HEADERS)


@router.get(ASSETS_PATH + "{digest}/{name}")
async def asset(digest: Annotated[str, Path(max_length=64)], name: Annotated[str, Path(max_length=64)]) -> Response:
    if digest != assets_digest() or name not in assets():
        raise HTTPException(404)
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]
    kept = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(assets()[name], media_type=media_type, headers=kept)


@cache
def render(needs_key: bool) -> str:
    """The document. What it shows comes later, over the API; `needs_key`: whether the API wants a bearer key."""
    base = f"{ASSETS_PATH.strip('/')}/{assets_digest()}"
    modules = sorted(name for name in assets() if name.endswith(".js"))
    return Template((files(__name__) / "page.html").read_text()).substitute(
        version=escape(__version__),
        base=base,
        preloads="\n".join(f'<link rel="modulepreload" href="{base}/{name}">' for name in modules),
        needs_key="yes" if needs_key else "no",
        modes=mode_options(),
        settings=engine_settings(),
    )


@cache
def assets() -> dict[str, bytes]:
    """Name -> content of everything in static/."""
    return {file.name: file.read_bytes() for file in (files(__name__) / "static").iterdir()}


@cache
def assets_digest() -> str:
    digest = hashlib.sha256()
    for name, content in sorted(assets().items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
