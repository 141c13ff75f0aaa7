"""A process beside the control plane that plans, replays and tunes, so that the event loop never waits for a planner.

The process is started for the first job, does one after the other, and ends when there has been none for a while. A
job that is cancelled or takes too long is ended with its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable

from llep.errors import ERRORS_BY_CODE, LlepError
from llep_server.errors import Busy, InvalidJson, InvalidRecording, InvalidRequest, MissingPackage, TookTooLong

logger = logging.getLogger(__name__)

IDLE_S = 120.0
ERRORS = ERRORS_BY_CODE | {cls.code: cls for cls in (InvalidJson, InvalidRequest, InvalidRecording, MissingPackage)}


class Worker:
    """Jobs for one process, in order of arrival; more than `most_waiting` are refused."""

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._ending: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def turn(self, timeout_s: float) -> AsyncIterator[None]:
        """The block is one job, with all that must be there for it. Raises Busy, TookTooLong."""
        if self._waiting >= self._most_waiting:
            raise Busy(f"{self._waiting} jobs wait already, no more are taken: try again later")
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise TookTooLong(f"it was not done within {timeout_s:g} s and was given up: ask for less") from None
        finally:
            self._turn.release()
            self._end_when_idle()

    async def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        await self._kill()

    async def do(self, kind: str, arguments: bytes, on_progress: Callable[[float], None] = lambda ratio: None) -> bytes:
        """In a turn: what llep_server.job answers to arguments, both in JSON. Raises what it raises."""
        if self._ending is not None:
            self._ending.cancel()
        is_over = False
        try:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"kind": kind, "bytes": len(arguments)}).encode() + b"\n" + arguments)
            await process.stdin.drain()
            while "progress" in (said := json.loads(await process.stdout.readuntil(b"\n"))):
                on_progress(said["progress"])
            answer = await process.stdout.readexactly(said["bytes"])
            is_over = True
        except (ConnectionError, asyncio.IncompleteReadError):
            raise LlepError("the process that simulates ended; see the control plane's log") from None
        finally:
            if not is_over:  # what it says next would be taken for the next job's answer
                await self._kill()
        if said["is_error"]:
            error = json.loads(answer)
            raise ERRORS.get(error["code"], LlepError)(error["message"], param=error["param"])
        return answer

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "llep_server.job"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C on the terminal is for us
            )
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _end_when_idle(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(IDLE_S, self._end)

    def _end(self) -> None:
        if not self._turn.locked() and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # it ends when there is nothing more to read
            self._process = None
