"""A control plane on a real port, with the real scheduler (without Ray around it) in the same process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI
from reporting import Engine

from llep.errors import SchedulerUnreachable
from llep.messages import decode_directive, encode
from llep.scheduler.actor import Scheduler
from llep_server.app import create_app
from llep_server.config import ServerConfig
from llep_server.connections import UVICORN_OPTIONS

T = TypeVar("T")

CHANGES = ("patch_settings", "rollback", "set_mode")


class InProcess:
    """Calls the scheduler as its client does, only not through Ray.

    is_up False: as if Ray were gone. wait_s: how long a change waits for the engines that it is for.
    """

    def __init__(self, state_dir: Path) -> None:
        self.scheduler = Scheduler(str(state_dir))
        self.is_up = True
        self.wait_s: float | None = None
        self.calls: list[str] = []

    async def call(self, method: str, **arguments: Any) -> Any:
        self.calls.append(method)
        if not self.is_up:
            raise SchedulerUnreachable("no scheduler at 'auto': start one with 'llep serve'")
        if method in CHANGES and self.wait_s is not None:
            arguments["wait_s"] = self.wait_s
        return await getattr(self.scheduler, method)(**arguments)


@dataclass
class Running:
    """A control plane that answers at `url`, and the scheduler behind it."""

    url: str
    caller: InProcess
    loop: asyncio.AbstractEventLoop
    http: httpx.Client
    app: FastAPI

    def await_(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the server's event loop, wait here."""
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(timeout=30)

    def call(self, method: str, **arguments: Any) -> Any:
        """Ask the scheduler, as an agent does."""
        return self.await_(self.caller.call(method, **arguments))

    def report(self, engine: Engine) -> list[str]:
        """Hand in what every rank says, take the directive if there is one; why reports were refused."""
        reports = [encode(report) for report in engine.reports()]
        answer = self.await_(self.caller.scheduler.report(reports, engine.revision))
        if answer["directive"] is not None:
            engine.take(decode_directive(answer["directive"]))
        refused: list[str] = answer["refused"]
        return refused


class _Server(uvicorn.Server):
    """Tells its event loop."""

    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def start(config: ServerConfig, state_dir: Path) -> Iterator[Running]:
    caller = InProcess(state_dir)
    app = create_app(replace(config, state_dir=state_dir), caller)
    server = _Server(uvicorn.Config(app, host=config.host, port=0, **UVICORN_OPTIONS))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the server did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as http:
            yield Running(url, caller, server.loop, http, app)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not end"
