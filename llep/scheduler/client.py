"""How other processes reach the scheduler: connect_scheduler for those that joined Ray, SchedulerClient for the rest.

A process that has joined Ray dies with Ray's control store, so SchedulerClient keeps a small bridge process that joins
in its place and is started again whenever it dies. Importing this module needs no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import logging
import os
import socket
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from llep.errors import ERRORS_BY_CODE, LlepError, SchedulerUnreachable, UnsupportedConfiguration

logger = logging.getLogger("llep.scheduler")

ACTOR_NAME = "llep-scheduler"
SCHEDULER_RESOURCE = "llep_scheduler"  # a Ray node that has it keeps the scheduler, for its state folder is there
DEFAULT_ADDRESS = "auto"
DEFAULT_NAMESPACE = "llep"
DEFAULT_STATE_DIR = "~/.local/state/llep"
MOST_ACTOR_CALLS = 8192  # a long poll of each agent, and everybody else

CALL_TIMEOUT_S = 2.0
CHANGE_TIMEOUT_S = 5.0  # beyond the wait_s of a change
CHANGES = frozenset(
    {
        *("patch_settings", "set_mode", "rollback", "placement_apply", "placement_rollback"),
        *("recording_start", "recording_stop", "recording_delete"),
    }
)
SLOW_TIMEOUT_S = 15.0
SLOW = frozenset({"placement_suggest", "recording_read"})  # plans all layers; a megabyte at a time
SET_RAY_METRICS = "set_ray_metrics"  # a call that the bridge answers itself
# Not tried again unasked when the actor dies under them: a change may have been stored, and who waits for a directive
# wants to know that the scheduler has lost its memory.
TRIED_ONCE = CHANGES | {"wait_directive"}
LONGEST_RESTART_PAUSE_S = 5.0
STEADY_AFTER_S = 30.0
END_TIMEOUT_S = 2.0
MOST_FRAME_BYTES = 1 << 30


def ray_address() -> str:
    return os.environ.get("LLEP_RAY_ADDRESS") or DEFAULT_ADDRESS


def ray_namespace() -> str:
    return os.environ.get("LLEP_RAY_NAMESPACE") or DEFAULT_NAMESPACE


def state_dir() -> Path:
    return Path(os.environ.get("LLEP_STATE_DIR") or DEFAULT_STATE_DIR).expanduser()


def connect_scheduler(address: str, namespace: str, state_dir: Path) -> Any:
    """A handle of the Scheduler actor, which is started with this state folder if nobody has yet; joins Ray if need be.

    Raises Ray's errors. May take seconds.
    """
    import ray

    from llep.scheduler.actor import Scheduler

    if not ray.is_initialized():
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    kept_by = {SCHEDULER_RESOURCE: 0.001} if SCHEDULER_RESOURCE in ray.cluster_resources() else {}
    actor = ray.remote(Scheduler).options(
        name=ACTOR_NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources=kept_by,
        max_concurrency=MOST_ACTOR_CALLS,
    )
    return actor.remote(str(state_dir))


def joined_address() -> str:
    """host:port of the Ray that this process has joined."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


class SchedulerClient:
    """Calls the scheduler's methods from a process that must not join Ray. Use it in `async with`.

    `async with SchedulerClient(address, namespace, state_dir) as client: await client.call("engines")`
    """

    def __init__(
        self, address: str | None = None, namespace: str | None = None, state_folder: Path | None = None
    ) -> None:
        """Arguments left out come from LLEP_RAY_ADDRESS, LLEP_RAY_NAMESPACE and LLEP_STATE_DIR."""
        self.address = check_address(address or ray_address())
        self.namespace = namespace or ray_namespace()
        self.state_folder = state_folder or state_dir()
        self._bridge: _Bridge | None = None
        self._problem = ""  # why there is no link; '' while there is one, or while the first is being made
        self._is_connected = asyncio.Event()
        self._is_decided = asyncio.Event()  # either connected or a problem
        self._keeping: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """Why the scheduler can't be reached now; '' if it can, or if that is not known yet."""
        return self._problem

    @property
    def is_connected(self) -> bool:
        return self._is_connected.is_set()

    async def __aenter__(self) -> Self:
        self._keeping = asyncio.create_task(self._keep_bridge(), name="llep-bridge")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeping is not None
        self._keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeping

    async def call(self, method: str, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """What the Scheduler's method returns, or the llep error that it raises.

        Raises SchedulerUnreachable with the address and the way out within timeout_s, which is 2 seconds by default and
        wait_s + 5 for changes.
        """
        if timeout_s is None:
            timeout_s = SLOW_TIMEOUT_S if method in SLOW else CALL_TIMEOUT_S
            if method in CHANGES:
                timeout_s = kwargs.get("wait_s", 3.0) + CHANGE_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(method, args, kwargs, timeout_s)
        except TimeoutError:
            raise self._unreachable(f"no answer to {method} within {timeout_s:g} s", method) from None

    async def wait_connected(self, timeout_s: float) -> bool:
        """Whether there is a link, after waiting for one for up to timeout_s."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_connected.wait(), timeout_s)
        return self.is_connected

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float) -> Any:
        await self._is_decided.wait()
        if not self.is_connected or self._bridge is None:
            raise self._unreachable(self._problem or "the link was lost")
        try:
            answer = await self._bridge.ask([method, args, kwargs, timeout_s])
        except ConnectionError:
            raise self._unreachable("the link was lost", method) from None
        if "error" not in answer:
            return answer["value"]
        if answer["error"] == SchedulerUnreachable.code:
            raise self._unreachable(answer["message"], method)
        raise ERRORS_BY_CODE.get(answer["error"], LlepError)(answer["message"], param=answer["param"])

    def _unreachable(self, why: str, method: str = "") -> SchedulerUnreachable:
        doubt = "; whether the change was stored is not known: look again" if method in CHANGES else ""
        return SchedulerUnreachable(
            f"the scheduler can't be reached through Ray at {self.address} (namespace {self.namespace}): {why}{doubt}. "
            "Start Ray there with `ray start --head`, or set LLEP_RAY_ADDRESS to where it runs"
        )

    async def _keep_bridge(self) -> None:
        """Start the bridge, again with growing pauses when it ends, until cancelled."""
        pause_s = 0.5
        while True:
            if importlib.util.find_spec("ray") is None:
                self._lost("Ray is not installed here: pip install 'llep[scheduler]'")
                await asyncio.sleep(3600)
            bridge = _Bridge(self.address, self.namespace, self.state_folder)
            started_s = asyncio.get_running_loop().time()
            try:
                self._bridge = bridge
                await bridge.run(self._news)
            except OSError as error:
                self._lost(f"the bridge process can't be started: {error}")
            finally:
                self._is_connected.clear()
                await bridge.end()
            lasted_s = asyncio.get_running_loop().time() - started_s
            pause_s = 0.5 if lasted_s > STEADY_AFTER_S else min(2 * pause_s, LONGEST_RESTART_PAUSE_S)
            self._lost(self._problem or "the link was lost" + (f" ({bridge.last_words})" if bridge.last_words else ""))
            await asyncio.sleep(pause_s)

    def _news(self, problem: str) -> None:
        """The bridge is connected ('') or says why it isn't."""
        if problem:
            self._lost(problem)
            return
        if not self.is_connected:
            logger.info("llep: connected to the scheduler through Ray at %s", self.address)
        self._problem = ""
        self._is_connected.set()
        self._is_decided.set()

    def _lost(self, problem: str) -> None:
        self._is_connected.clear()
        if problem != self._problem:
            self._problem = problem
            self._is_decided.set()
            logger.warning("llep: %s. Until then it is tried again and again", self._unreachable(problem).message)


class _Bridge:
    """One bridge process and the talk with it: [id, request] frames out, [id, answer] frames back, id 0 for news."""

    def __init__(self, address: str, namespace: str, state_folder: Path) -> None:
        self._arguments = [
            *("--parent-pid", str(os.getpid()), "--address", address, "--namespace", namespace),
            *("--state-dir", str(state_folder)),
        ]
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=20)

    @property
    def last_words(self) -> str:
        """The last line that the process wrote, for somebody to make sense of its end."""
        return self._lines[-1] if self._lines else ""

    async def run(self, news: Any) -> None:
        """Start the process and hear it until it ends; `news(problem)` is called on each change of its link."""
        ours, theirs = socket.socketpair()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "llep.scheduler.bridge", "--fd", str(theirs.fileno()), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C on the terminal is for us; the bridge ends when our end closes
            )
        self._log = asyncio.create_task(self._keep_log())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                number, answer = msgspec.msgpack.decode(await read_frame(reader))
                if number == 0:
                    news(answer)
                elif waiting := self._waiting.pop(number, None):
                    if not waiting.done():
                        waiting.set_result(answer)

    async def ask(self, request: Any) -> dict[str, Any]:
        """The answer to a request. Raises ConnectionError if the bridge ends first."""
        if self._writer is None or self._writer.is_closing():
            raise ConnectionResetError("the bridge has ended")
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            write_frame(self._writer, [number, request])
            await self._writer.drain()
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def end(self) -> None:
        """End the process, whatever it does, and fail what still waits."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the bridge has ended"))
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._process is not None:
            await self._reap(self._process)
        if self._log is not None:
            await self._log

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _keep_log(self) -> None:
        """Ray writes stack traces when it goes down: for debugging only."""
        assert self._process is not None and self._process.stderr is not None
        with contextlib.suppress(ValueError):  # a line beyond the limit
            async for line in self._process.stderr:
                text = line.decode(errors="replace").strip()
                if text:
                    self._lines.append(text[:500])
                    logger.debug("bridge: %s", text)


def check_address(address: str) -> str:
    """'auto' or host:port. Raises UnsupportedConfiguration."""
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal() and 0 < int(port) < 65536 and "/" not in host):
        raise UnsupportedConfiguration(
            f"the Ray address {address!r} is neither 'auto' nor host:port, such as 127.0.0.1:6379",
            param="LLEP_RAY_ADDRESS",
        )
    return address


def write_frame(writer: asyncio.StreamWriter, message: Any) -> None:
    """A message as four bytes of length and msgpack."""
    data = msgspec.msgpack.encode(message)
    writer.write(len(data).to_bytes(4, "big") + data)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next message's msgpack. Raises IncompleteReadError at the end, ConnectionError on nonsense."""
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > MOST_FRAME_BYTES:
        raise ConnectionAbortedError(f"a frame of {size} bytes")
    return await reader.readexactly(size)
