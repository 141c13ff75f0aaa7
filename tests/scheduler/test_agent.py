"""What the agent does with messages that it can't bring: a real socket, and a real scheduler without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from llep.messages import decode_directive, decode_snapshot, encode
from llep.scheduler import agent as agents
from llep.scheduler.actor import Scheduler
from llep.scheduler.agent import Agent, bind
from tests.scheduler.peer import Workers
from tests.scheduler.test_actor import run, scheduler_in


class Caller:
    """Calls a scheduler in this process; `spoil` is what its link, or its version, does to directives."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.spoil: Callable[[bytes], bytes] = bytes
        self.asked = 0  # for directives

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        answer = await getattr(self._scheduler, method)(*args)
        if method == "wait_directive":
            self.asked += 1
            return self.spoil(answer) if answer else answer
        return {**answer, "directive": None}


@contextlib.asynccontextmanager
async def running(scheduler: Scheduler, socket: Path) -> AsyncIterator[tuple[Caller, Any]]:
    """The agent of engine `one`, and a socket of a worker."""
    caller, context = Caller(scheduler), zmq.asyncio.Context()
    router, worker = bind(str(socket)), context.socket(zmq.DEALER)
    worker.connect(f"ipc://{socket}")
    agent = Agent("one", router, caller)  # type: ignore[arg-type]
    works = [asyncio.create_task(work) for work in (agent.receive(), agent.forward(), agent.listen())]
    try:
        yield caller, worker
        assert not any(work.done() for work in works)
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        router.close(0)
        context.destroy(0)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await is_so():
            await asyncio.sleep(0.02)


def test_what_the_agent_leaves_out_is_counted(short_folder: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler, running(scheduler, short_folder / "1") as (_, worker):
            garbled = bytearray(encode(Workers("one").report(0)))
            garbled[len(garbled) // 2] ^= 1
            for report in (b"nonsense", bytes(garbled), encode(Workers("two").report(0))):
                await worker.send(report)

            async def is_counted() -> bool:
                return (await scheduler.status())["reports_refused"] == {"garbled": 2, "engine": 1}

            await until(is_counted)
            assert await scheduler.engines() == []
            assert decode_snapshot(await scheduler.metrics()).refused == {"garbled": 2, "engine": 1}
            assert (await scheduler.status())["reports_total"] == 3

    run(body)


def test_a_directive_that_cant_be_read_is_waited_out(
    short_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler of another version: the agent ended, was started again, and so on for ever."""
    monkeypatch.setattr(agents, "UNREADABLE_RETRY_S", 0.2)

    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler, running(scheduler, short_folder / "2") as (caller, worker):
            caller.spoil = lambda data: encode(msgspec.structs.replace(decode_directive(data), protocol=99))
            for report in Workers("one").reports():
                await worker.send(encode(report))
            await scheduler.patch_settings({"watchdog_s": 50}, "me", wait_s=0)

            async def has_asked_again() -> bool:
                return caller.asked >= 3

            await until(has_asked_again)
            asked = caller.asked
            await asyncio.sleep(0.5)
            assert caller.asked <= asked + 3
            assert [record.message for record in caplog.records if "protocol 99 is not" in record.message] == [
                "a directive of the scheduler can't be read, the engine runs on as it is: protocol 99 is not 3: engine "
                "and scheduler run different versions of llep"
            ]
            caller.spoil = bytes
            assert decode_directive(await asyncio.wait_for(worker.recv(), 10)).settings["watchdog_s"] == 50

    run(body)
