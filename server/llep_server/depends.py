"""What many routes take: the scheduler, the engine that is meant, why something is changed, which page of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from llep.errors import UnknownEngine
from llep.views import EngineView
from llep_server.errors import InvalidRequest, unknown_name
from llep_server.middleware import author_of
from llep_server.scheduler import Scheduler
from llep_server.schemas import Page

T = TypeVar("T", bound=BaseModel)

MAX_WINDOW_S = 3600.0
MAX_ID = 2**62
MAX_NAME = 200
MAX_REASON = 500
IF_MATCH = r'^(\*|(W/)?"[0-9]{1,18}")$'


def _scheduler(request: Request) -> Scheduler:
    scheduler: Scheduler = request.app.state.scheduler
    return scheduler


def refuse_unknown_query(request: Request) -> None:
    """A mistyped ?dry_run must not change anything."""
    known = _query_names(request.scope["route"].dependant)
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(unknown_name("query parameter", name, known), param=name)


def _query_names(dependant: Dependant) -> list[str]:
    """Of a route and of all that it depends on."""
    own = [field.alias for field in dependant.query_params]
    return own + [name for other in dependant.dependencies for name in _query_names(other)]


def author(request: Request) -> str:
    """Who is asking and from where."""
    return author_of(request.scope)


def note(request: Request, **fields: str | int) -> None:
    """Say in the request's log line and span what it was about."""
    request.scope["state"].setdefault("log", {}).update(fields)


async def only_engine(scheduler: Scheduler, where: str = "query") -> str:
    """The one engine that has reported. Raises InvalidRequest if there are several or none."""
    names = [view.id for view in await scheduler.engines()]
    if len(names) != 1:
        known = f"there are {', '.join(names)}" if names else "none has reported yet"
        raise InvalidRequest(f"engine is missing from the {where}: {known}", param="engine")
    return names[0]


async def find_engine(scheduler: Scheduler, name: str) -> EngineView:
    """Raises UnknownEngine."""
    engines = {view.id: view for view in await scheduler.engines()}
    if name not in engines:
        raise UnknownEngine(unknown_name("engine", name, engines), param="engine")
    return engines[name]


SchedulerDep = Annotated[Scheduler, Depends(_scheduler)]
AuthorDep = Annotated[str, Depends(author)]
OneEngineQuery = Annotated[
    str | None, Query(description="which engine; not needed while there is only one", max_length=MAX_NAME)
]
EngineQuery = Annotated[str | None, Query(description="only this engine", max_length=MAX_NAME)]
EnginesQuery = Annotated[
    list[str] | None, Query(description="only these engines (repeat it); without it all, also those still to come")
]
ReasonQuery = Annotated[str, Query(description="why, for the audit trail", max_length=MAX_REASON)]
WindowQuery = Annotated[float, Query(ge=1, le=MAX_WINDOW_S, allow_inf_nan=False, description="seconds back")]
LimitQuery = Annotated[int, Query(ge=1, le=500, description="most entries of the answer")]
CursorQuery = Annotated[int | None, Query(ge=1, le=MAX_ID, description="next_cursor of the page before")]
IfMatchHeader = Annotated[
    str | None,
    Header(description="the ETag that was read: 412 if somebody was faster", json_schema_extra={"pattern": IF_MATCH}),
]
# Only so that the API's description shows it; middleware.Gate does the checking, before anything is parsed.
bearer = HTTPBearer(auto_error=False, description="A key of the control plane's keys file.")


def page_of(found: Sequence[T], limit: int, key: Callable[[T], int]) -> Page[T]:
    """A page of at most `limit` of what was found by asking for one more. key: what the next page starts below."""
    shown, has_more = list(found[:limit]), len(found) > limit
    return Page(data=shown, has_more=has_more, next_cursor=str(key(shown[-1])) if has_more else None)


def parse_if_match(value: str | None) -> int | None:
    """The revision that an If-Match header names; None for any. Raises InvalidRequest."""
    if value is None or value.strip() == "*":
        return None
    revision = value.strip().removeprefix("W/").strip('"')
    if not (revision.isascii() and revision.isdecimal()) or len(revision) > 18:
        raise InvalidRequest(
            f'If-Match={value!r} is not a revision: send the ETag of GET /v1/settings, such as "3"', param="If-Match"
        )
    return int(revision)
