"""Loads as server-sent events: the scheduler is asked once a second, however many listen.

The newest events are kept, so that who was away for a moment goes on where it was. Every listener reads from that one
buffer at its own pace; who falls behind its end, or does not take an event in time, is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llep.errors import LlepError
from llep_server.connections import ENDLESS
from llep_server.errors import TooManyStreams
from llep_server.scheduler import Scheduler

logger = logging.getLogger(__name__)

EVERY_S = 1.0
WINDOW_S = 10.0
KEPT_EVENTS = 120
GO_ON_S = 60.0  # after the last listener has gone, so that it can come back and miss nothing
KEEP_ALIVE_S = 15.0
TAKE_WITHIN_S = 10.0
MAX_STREAMS = 256
MAX_EVENT_ID = 64
RETRY_MS = 2000


@dataclass(slots=True)
class Moment:
    """What happened in one second. Kept as text: views would take many times the memory, KEPT_EVENTS times over."""

    number: int
    name: str
    time_s: float
    loads: dict[str, str] = field(default_factory=dict)  # engine -> its EngineLoads as JSON
    problem: dict[str, Any] | None = None
    _texts: dict[str | None, bytes] = field(default_factory=dict)

    def text(self, engine: str | None) -> bytes:
        """The event as it is sent, of one engine or all; made once for all who want the same."""
        known = engine if engine is None or engine in self.loads else ""  # of all that are not here the same is said
        if known not in self._texts:
            self._texts[known] = self._text(known)
        return self._texts[known]

    def _text(self, engine: str | None) -> bytes:
        if self.problem is not None:
            return _event("problem", self.name, json.dumps({"time_s": self.time_s, "error": self.problem}))
        chosen = [loads for name, loads in self.loads.items() if engine in (None, name)]
        return _event("loads", self.name, f'{{"time_s":{self.time_s},"loads":[{",".join(chosen)}]}}')


class Broadcast:
    """The moments, made while anybody listens."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._run = uuid.uuid4().hex[:8]  # ids of another run of the control plane mean nothing here
        self._moments: deque[Moment] = deque(maxlen=KEPT_EVENTS)
        self._number = 0
        self._news = asyncio.Event()
        self._making: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        self.listeners = 0

    def open(self, engine: str | None, last_event_id: str | None, may_listen: Callable[[], bool]) -> EventStream:
        """A stream from after that event on, or from the newest, for as long as it may. Raises TooManyStreams."""
        if self.listeners >= MAX_STREAMS:
            raise TooManyStreams(
                f"{self.listeners} streams are open, no more are taken: close some, or try again later"
            )
        return EventStream(self, engine, last_event_id, may_listen)

    async def close(self) -> None:
        if self._making is not None:
            self._making.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._making

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self.listeners += 1
        if self._making is None or self._making.done():
            self._moments.clear()  # from before a pause
            self._making = asyncio.get_running_loop().create_task(self._make())
        try:
            yield
        finally:
            self.listeners -= 1
            self._heard_s = time.monotonic()

    def resume(self, last_event_id: str | None) -> tuple[int, bytes]:
        """Number of the event to go on after, and what to say first."""
        newest = self._moments[-1].number - 1 if self._moments else self._number
        if last_event_id is None:
            return newest, b""
        run, _, number = last_event_id.partition("-")
        oldest = self._moments[0].number if self._moments else self._number + 1
        if run == self._run and number.isascii() and number.isdecimal() and oldest - 1 <= int(number) <= self._number:
            return int(number), b""
        return newest, _event(
            "missed", None, json.dumps({"last_event_id": last_event_id, "kept_s": KEPT_EVENTS * EVERY_S})
        )

    async def after(self, number: int, timeout_s: float) -> list[Moment] | None:
        """Moments after that number, none if the time is over; None if some were dropped that come in between."""
        news = self._news
        if self._number <= number:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), timeout_s)
        found = [moment for moment in self._moments if moment.number > number]
        return found if not found or found[0].number == number + 1 else None

    async def _make(self) -> None:
        while self.listeners or time.monotonic() - self._heard_s < GO_ON_S:
            started_s = time.monotonic()
            loads: dict[str, str] = {}
            problem = None
            try:
                loads = {each.engine: each.model_dump_json() for each in await self._scheduler.loads(WINDOW_S, None)}
            except LlepError as error:
                problem = {"message": error.message, "code": error.code}
            except Exception as error:  # listeners would hear nothing, for ever
                logger.exception("no loads for the stream")
                problem = {
                    "message": f"{type(error).__name__}: the control plane's log says more",
                    "code": LlepError.code,
                }
            self._number += 1
            name = f"{self._run}-{self._number}"
            self._moments.append(Moment(self._number, name, time.time(), loads, problem))
            news, self._news = self._news, asyncio.Event()
            news.set()
            await asyncio.sleep(max(EVERY_S - (time.monotonic() - started_s), 0.0))


class EventStream(Response):
    """One listener."""

    media_type = "text/event-stream"

    def __init__(
        self, broadcast: Broadcast, engine: str | None, last_event_id: str | None, may_listen: Callable[[], bool]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._broadcast = broadcast
        self._engine = engine
        self._last_event_id = last_event_id
        self._may_listen = may_listen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[ENDLESS] = True
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError, OSError):
                await sending

    async def _send(self, send: Send) -> None:
        """Until cancelled, or the listener may not listen any more, or does not take what it is sent."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with self._broadcast.listening():
            number, text = self._broadcast.resume(self._last_event_id)
            text = f"retry: {RETRY_MS}\n\n".encode() + text
            while True:
                async with asyncio.timeout(TAKE_WITHIN_S):
                    await send({"type": "http.response.body", "body": text, "more_body": True})
                moments = await self._broadcast.after(number, KEEP_ALIVE_S)
                if moments is None:
                    logger.info("a listener to loads fell behind and is dropped")
                    return
                if not self._may_listen():
                    logger.info("a listener to loads is dropped: its key is not known any more")
                    return
                number = moments[-1].number if moments else number
                text = b"".join(moment.text(self._engine) for moment in moments) or b": still here\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(kind: str, name: str | None, data: str) -> bytes:
    head = f"id: {name}\n" if name else ""
    return f"{head}event: {kind}\ndata: {data}\n\n".encode()
