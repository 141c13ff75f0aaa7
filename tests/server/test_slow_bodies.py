"""Clients that send a body slowly, or go away in the middle: bounded time, and nothing half-read reaches a route."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llep_server.connections import UVICORN_OPTIONS
from llep_server.middleware import BoundedBody

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture
def port_and_seen() -> Iterator[tuple[int, list[bytes]]]:
    """A server that gives bodies half a second and notes those that arrive."""
    seen: list[bytes] = []

    async def note(request: Request) -> PlainTextResponse:
        seen.append(await request.body())
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", note, methods=["POST"])], middleware=[Middleware(BoundedBody, max_s=0.5)])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, **UVICORN_OPTIONS))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def test_a_body_in_pieces_arrives_whole(port_and_seen: tuple[int, list[bytes]]) -> None:
    port, seen = port_and_seen
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"ab")
        time.sleep(0.1)
        client.sendall(b"cd")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert seen == [b"abcd"]


def test_a_body_that_never_ends_is_given_up(port_and_seen: tuple[int, list[bytes]]) -> None:
    port, seen = port_and_seen
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"ab")
        answer = b""
        while chunk := client.recv(4096):  # until the server closes
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer
    assert seen == []


def test_a_client_that_goes_away_leaves_nothing(port_and_seen: tuple[int, list[bytes]]) -> None:
    port, seen = port_and_seen
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"ab")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(HEAD + b"abcd")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert seen == [b"abcd"]
