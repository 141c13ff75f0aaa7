"""What happens to every request before a route sees it: an id, a log line, a check of the key, a bounded body."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from llep.errors import LlepError
from llep_server.config import ServerConfig, is_loopback
from llep_server.errors import (
    REQUEST_ID_HEADER,
    BodyTooLarge,
    BodyTooSlow,
    Forbidden,
    ForeignHost,
    ForeignOrigin,
    TooManyFailures,
    Unauthenticated,
    respond,
)
from llep_server.failures import Failures
from llep_server.keys import ANONYMOUS, KeyRing, Principal, Scope, sent_key
from llep_server.tracing import Tracing

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
MAX_BODY_BYTES_BY_PATH = {"/v1/plans/simulate": 16 << 20}
MAX_BODY_S = 30.0
# Probes, and what says nothing about engines. Whatever is not named here needs a key where there are keys.
OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/version", "/docs", "/openapi.json"})
OPEN_PREFIX = "/static/"  # the page's own files
READING_METHODS = frozenset({"GET", "HEAD"})
# POST because they take a body or much time: they change nothing, scope read is enough.
READING_PATHS = frozenset({"/v1/plans/simulate", "/v1/placement/suggest"})
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestContext:
    """Gives each request an id (the client's own, if it is decent), answers with it, and logs changes and failures."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            took_ms = (time.perf_counter() - started) * 1000
            is_news = status >= 400 or scope["method"] not in READING_METHODS
            level = logging.INFO if is_news else logging.DEBUG
            if logger.isEnabledFor(level):
                _log_request(level, scope, status, took_ms)
            if self.tracing is not None and scope["method"] not in READING_METHODS:
                self.tracing.request(scope, status, took_ms / 1000, author_of(scope))


def _log_request(level: int, scope: AsgiScope, status: int, took_ms: float) -> None:
    state = scope["state"]
    path, author = quote(scope["path"]), author_of(scope)
    logger.log(
        level,
        "%s %s %d %.1f ms author=%s request_id=%s",
        *(scope["method"], path, status, took_ms, author, state["request_id"]),
        extra={
            **{"request_id": state["request_id"], "author": author, "method": scope["method"], "path": path},
            **{"status": status, "took_ms": round(took_ms, 1)},
            **state.get("log", {}),
        },
    )


class Gate:
    """Lets in who may: keys where there are keys, else (on loopback) only those who address this machine as such."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: KeyRing | None) -> None:
        self.app = app
        self.config = config
        self.keys = keys
        self.failures = Failures()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            principal = self._admit(scope)
        except LlepError as error:
            wait_s = self.failures.wait_s(_client(scope), None) if isinstance(error, TooManyFailures) else 0.0
            headers = {"Retry-After": str(math.ceil(wait_s))} if wait_s else None
            return await respond(scope, error, headers)(scope, receive, send)
        scope["state"]["principal"] = principal
        await self.app(scope, receive, send)

    def _admit(self, scope: AsgiScope) -> Principal | None:
        headers = Headers(scope=scope)
        if self.config.checks_host:
            _check_host(headers.get("host", ""), self.config.allowed_hosts)
        if scope["method"] not in READING_METHODS:
            _check_origin(headers)
        if self.keys is None:
            return ANONYMOUS
        has_sent = bool(headers.get("authorization"))
        principal = self.keys.find(sent_key(headers))
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX):
            return principal
        if has_sent:
            self._count(_client(scope), principal)
        if principal is None:
            what = "the key is not known" if has_sent else "a key is needed"
            raise Unauthenticated(
                f"{what}: send 'Authorization: Bearer KEY' with a key of the control plane's keys file"
            )
        is_reading = scope["method"] in READING_METHODS or scope["path"] in READING_PATHS
        needed = Scope.READ if is_reading else Scope.ADMIN
        if not principal.may(needed):
            raise Forbidden(f"the key of {principal.name!r} has scope read, this needs scope admin: use another key")
        return principal

    def _count(self, client: str, principal: Principal | None) -> None:
        """Raises TooManyFailures, also for a good key that nobody has used from there: else guessing would pay."""
        wait_s = self.failures.wait_s(client, principal.name if principal else None)
        if wait_s:
            raise TooManyFailures(
                f"too many wrong keys came from {client}: try again in {math.ceil(wait_s)} s", param="Authorization"
            )
        if principal is None:
            self.failures.failed(client)
        else:
            self.failures.succeeded(client, principal.name)


class BoundedBody:
    """Reads the whole body, at most so many bytes in so many seconds, before anybody parses it."""

    def __init__(self, app: ASGIApp, max_s: float = MAX_BODY_S) -> None:
        self.app = app
        self.max_s = max_s

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await _read_body(Headers(scope=scope), receive, most_bytes(scope["path"]), self.max_s)
        except LlepError as error:
            response = respond(scope, error)
            response.headers["Connection"] = "close"  # the rest of the body is not going to be read
            return await response(scope, receive, send)
        if body is None:
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        await self.app(scope, lambda: _replay(first, receive), send)


def author_of(scope: AsgiScope) -> str:
    """Who is asking and from where, for the audit trail: 'alice@10.0.0.7'."""
    principal = scope.get("state", {}).get("principal")
    return f"{principal.name if principal else 'anonymous'}@{_client(scope)}"


def _client(scope: AsgiScope) -> str:
    client = scope.get("client")
    return client[0] if client else "unknown"


def _check_origin(headers: Headers) -> None:
    """A browser says from which page a request comes: not from another site's, for it can reach loopback too."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        raise ForeignOrigin(
            f"Origin {origin[:100]!r} is another site's page: changes are taken from the control plane's own page, "
            "or from programs, which send no Origin",
            param="Origin",
        )


def _check_host(host: str, allowed: Sequence[str]) -> None:
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    # No look-up: a name that some web page has pointed at 127.0.0.1 is just what must stay out.
    if name.lower() not in ("localhost", "", *allowed) and not (_is_address(name) and is_loopback(name)):
        raise ForeignHost(
            f"Host {host!r} is no name of this control plane: use http://127.0.0.1 or localhost, name it in "
            "LLEP_SERVER_ALLOWED_HOSTS, or start the control plane with a keys file",
            param="Host",
        )


def _is_address(name: str) -> bool:
    return bool(re.fullmatch(r"\[[0-9a-fA-F:.]+\]|[0-9.]+", name))


def most_bytes(path: str) -> int:
    """What a body sent there may have."""
    return MAX_BODY_BYTES_BY_PATH.get(path, MAX_BODY_BYTES)


async def _read_body(headers: Headers, receive: Receive, most: int, max_s: float) -> bytes | None:
    """The body; None if the client went away. Raises BodyTooLarge, BodyTooSlow."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise BodyTooLarge(_too_large(f"{announced} bytes", most), param="body")
    body = bytearray()
    try:
        async with asyncio.timeout(max_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > most:
                    raise BodyTooLarge(_too_large("more", most), param="body")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {max_s:g} s: send it again", param="body") from None


def _too_large(size: str, most: int) -> str:
    return f"the body has {size}, at most {most} bytes ({most >> 20} MiB) are taken"


async def _replay(first: list[Message], receive: Receive) -> Message:
    return first.pop() if first else await receive()
