"""How uvicorn treats connections: bounded headers in bounded time, and nobody who does not read is waited for."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_S = 10.0
SWITCH_S = 0.001  # a thread that computes lets the event loop in so soon
UNREAD_S = 30  # after which the kernel gives up a client that takes nothing of what is sent to it
ENDLESS = "is_endless"  # in a request's state: its answer has no end that is worth waiting for when the server stops


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP whose requests must have begun, headers and all, in time: uvicorn itself would wait for ever."""

    max_header_s = MAX_HEADER_S
    _header_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        if not self._is_busy():
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and b"\r\n\r\n" not in data:
                self._give_up()
                return
            if self._deadline is None:
                self._begin()
        super().data_received(data)
        if self._is_busy():
            self._header_bytes = 0
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        if self._is_busy() and self.cycle.scope.get("state", {}).get(ENDLESS):
            self.transport.close()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self.max_header_s, self._give_up)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._end()
        if not self._is_busy():
            self.transport.abort()


UVICORN_OPTIONS: dict[str, Any] = {
    "http": BoundedProtocol,
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,  # the audit trail names who really called
    "timeout_graceful_shutdown": 5,
    "lifespan": "on",
}


def settle() -> None:
    """For a process that answers many: nobody waits for long, neither for garbage to be found nor for a busy thread.

    What start-up made stays anyway; looking through it for garbage would stop everything for 100 ms now and then.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)


def give_up_the_unread(listener: socket.socket) -> None:
    """Accepted connections inherit it; where the system has no such thing, TCP's own patience holds."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
