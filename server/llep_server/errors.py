"""Every failure as one JSON body: {"error": {"message", "type", "param", "code"}, "request_id"}."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Scope as AsgiScope

from llep.errors import (
    LlepError,
    PlacementRefused,
    RecordingConflict,
    RevisionConflict,
    SchedulerUnreachable,
    SettingsError,
    StoreUnavailable,
    UnknownEngine,
    UnknownPlan,
    UnknownRecording,
    UnknownRevision,
    UnsupportedConfiguration,
)

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail
    request_id: str


class InvalidRequest(LlepError):
    """A parameter or the body is not what the route takes."""

    code = "invalid_request"


class InvalidJson(LlepError):
    """The body is not JSON."""

    code = "invalid_json"


class UnsupportedMediaType(LlepError):
    code = "unsupported_media_type"


class Unauthenticated(LlepError):
    """No key, or one that nobody has."""

    code = "invalid_key"


class Forbidden(LlepError):
    """The key is good, but not for this."""

    code = "insufficient_scope"


class ForeignHost(LlepError):
    """A request must address the control plane by a name of its own (a web page elsewhere can't)."""

    code = "foreign_host"


class BodyTooLarge(LlepError):
    code = "body_too_large"


class BodyTooSlow(LlepError):
    code = "body_too_slow"


class ForeignOrigin(LlepError):
    """A page of another site must not change anything in a browser's name."""

    code = "foreign_origin"


class TooManyFailures(LlepError):
    """One address has sent too many wrong keys."""

    code = "too_many_failures"


class UnknownOperation(LlepError):
    code = "unknown_operation"


class InvalidRecording(LlepError):
    """A recording's content can't be replayed."""

    code = "invalid_recording"


class InvalidRange(LlepError):
    """The bytes asked for are not there."""

    code = "invalid_range"


class MissingPackage(LlepError):
    """What is asked for needs a package that is not installed."""

    code = "missing_package"


class Busy(LlepError):
    """As much as is allowed at once is being done already."""

    code = "busy"


class TooManyStreams(LlepError):
    code = "too_many_streams"


class TookTooLong(LlepError):
    """It was given up after the time that it may take."""

    code = "took_too_long"


class Interrupted(LlepError):
    """The control plane ended before what it was doing did."""

    code = "interrupted"


class NotReady(LlepError):
    """Some part that readiness needs is missing."""

    code = "not_ready"


# The one table: what each error is to an HTTP client.
STATUS_BY_ERROR: dict[type[LlepError], int] = {
    InvalidJson: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    ForeignHost: 403,
    ForeignOrigin: 403,
    UnknownEngine: 404,
    UnknownPlan: 404,
    UnknownRevision: 404,
    UnknownRecording: 404,
    UnknownOperation: 404,
    BodyTooSlow: 408,
    RecordingConflict: 409,
    RevisionConflict: 412,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    InvalidRange: 416,
    InvalidRequest: 422,
    PlacementRefused: 422,
    SettingsError: 422,
    UnsupportedConfiguration: 422,
    InvalidRecording: 422,
    MissingPackage: 422,
    TooManyFailures: 429,
    LlepError: 500,
    SchedulerUnreachable: 503,
    StoreUnavailable: 503,
    Busy: 503,
    TooManyStreams: 503,
    Interrupted: 503,
    NotReady: 503,
    TookTooLong: 504,
}
TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    412: "conflict_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODE_BY_STATUS = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
HEADERS_BY_STATUS = {401: {"WWW-Authenticate": 'Bearer realm="llep"'}, 503: {"Retry-After": "2"}}
REQUEST_ID_HEADER = "X-Request-Id"


def status_of(error: LlepError) -> int:
    return next(STATUS_BY_ERROR[cls] for cls in type(error).__mro__ if cls in STATUS_BY_ERROR)


def error_body(scope: AsgiScope, status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPE_BY_STATUS.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": error, "request_id": scope.get("state", {}).get("request_id", "")}


def json_response(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII: what a client sent may hold lone surrogates, which UTF-8 can't encode.
    content = json.dumps(body, ensure_ascii=True).encode()
    headers = {**HEADERS_BY_STATUS.get(status, {}), **(headers or {})}
    return Response(content, status, headers, media_type="application/json")


def respond(scope: AsgiScope, error: LlepError, headers: Mapping[str, str] | None = None) -> Response:
    status = status_of(error)
    return json_response(error_body(scope, status, error.message, error.code, error.param), status, headers)


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` for OpenAPI: these statuses answer with ErrorBody."""
    return {
        status: {"model": ErrorBody, "description": TYPE_BY_STATUS.get(status, "invalid_request_error")}
        for status in statuses
    }


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest one known."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"unknown {kind} {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "; there is none here")


def install(app: FastAPI) -> None:
    """Make every failure of `app` answer with the one body."""

    @app.exception_handler(LlepError)
    async def _llep_error(request: Request, error: LlepError) -> Response:
        if status_of(error) == 500:
            logger.error("%s: %s", error.code, error.message)
        return respond(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        return respond(request.scope, _explain(request, error))

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        status = error.status_code
        allowed = ", ".join(_methods(app, request.scope)) if status == 405 else ""
        message = _sentence(request, error, allowed)
        body = error_body(request.scope, status, message, CODE_BY_STATUS.get(status, "http_error"))
        return json_response(body, status, {"Allow": allowed} if allowed else error.headers)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        message = "an error inside the control plane: its log has the details under this request id"
        body = error_body(request.scope, 500, message, "internal_error")
        # This answer is made outside the middleware that adds the header.
        return json_response(body, 500, {REQUEST_ID_HEADER: body["request_id"]})


def _methods(app: FastAPI, scope: AsgiScope) -> list[str]:
    """What the path of a request may be asked with; Starlette names the first route's methods only."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in routes for method in route.methods or ()})


def _sentence(request: Request, error: HTTPException, allowed: str) -> str:
    path = request.url.path
    if error.status_code == 404:
        return f"there is nothing at {path!r}: see /docs for what there is"
    if error.status_code == 400:
        return "the body can't be read: it is not UTF-8, or a number or the nesting in it is too large"
    if error.status_code == 405:
        return f"{request.method} is not for {path}: use {allowed}"
    return str(error.detail)


def _explain(request: Request, error: RequestValidationError) -> LlepError:
    first = error.errors()[0]
    where, *names = first["loc"]
    if first["type"] == "json_invalid":
        return InvalidJson(f"the body is not JSON: {first['ctx']['error']} at character {names[-1]}", param="body")
    if where == "body" and not names:
        try:
            require_json(request)
        except UnsupportedMediaType as wrong:
            return wrong
    name = ".".join(str(name) for name in names) or str(where)
    rule = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidRequest(f"{name} is missing from the {where}", param=name)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{name} is not a member of this {where}", param=name)
    return InvalidRequest(f"{name}={_short(first['input'])} is not valid: {rule[0].lower()}{rule[1:]}", param=name)


def require_json(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body says that it is JSON."""
    media_type = request.headers.get("content-type", "")
    if not media_type.partition(";")[0].strip().lower().endswith("json"):
        raise UnsupportedMediaType(
            f"the body's Content-Type is {media_type or 'missing'}: send it as application/json", param="body"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
