"""`python -m llep.scheduler.bridge`: joins Ray in its parent's place and passes calls on to the Scheduler actor.

It tells the parent when the link comes and goes, ends itself when the link stays away (a fresh process joins a new Ray
best), and ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from llep.errors import LlepError, SchedulerUnreachable
from llep.scheduler.client import (
    DEFAULT_ADDRESS,
    SET_RAY_METRICS,
    TRIED_ONCE,
    connect_scheduler,
    joined_address,
    read_frame,
    write_frame,
)
from llep.scheduler.ray_metrics import RayMetrics

logger = logging.getLogger("llep.scheduler.bridge")

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 1.0
JOIN_TIMEOUT_S = 45.0
PING_EVERY_S = 2.0
PING_TIMEOUT_S = 3.0
LINK_LOST_AFTER_S = 30.0  # of silence only: a Ray that is gone, and an actor that died, are noticed at once
CLOSED_LOST_AFTER_S = 5.0  # of silence, when Ray has closed our connection: another Ray may listen there by now
RETRY_EVERY_S = 0.2
NOBODY_LISTENS = "nothing listens there"
RAY_HAS_ENDED = "the Ray that was joined has ended"
KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 2,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 2,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}
ENDED, LINK_LOST = 0, 75  # exit statuses


class Bridge:
    """Serves the parent at the other end of a socket."""

    def __init__(self, address: str, namespace: str, state_dir: Path, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._namespace = namespace
        self._state_dir = state_dir
        self._writer = writer
        self._handle: Any = None
        self._metrics = RayMetrics()
        self._calls: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer requests until the parent is gone."""
        try:
            while True:
                number, request = msgspec.msgpack.decode(await read_frame(reader))
                call = asyncio.create_task(self._answer(number, *request))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def keep_link(self) -> None:
        """Join Ray, then see to it that the actor answers. Returns when the link is lost for good."""
        await self._wait_for_ray()
        joining = asyncio.create_task(self._connect())
        if self._address != DEFAULT_ADDRESS:  # a join of what has ended meanwhile goes on until its time is up
            is_open = asyncio.create_task(_until_closed(*self._host_and_port))
            await asyncio.wait([joining, is_open], return_when=asyncio.FIRST_COMPLETED)
            is_open.cancel()
            if not joining.done():
                return self._tell(RAY_HAS_ENDED)
        try:
            await joining
        except TimeoutError:
            self._tell(f"joining Ray took more than {JOIN_TIMEOUT_S:g} s")
            return
        except Exception as error:  # Ray raises what it likes; a fresh process tries again
            self._tell(_first_line(error))
            return
        self._tell("")
        is_open = asyncio.create_task(_until_closed(*self._host_and_port))
        answered_s = time.monotonic()
        while True:
            if is_open.done() and not await self._ray_listens():
                return self._tell(RAY_HAS_ENDED)
            if await self._ping():
                answered_s = time.monotonic()
                if is_open.done():  # Ray closes it now and then, for we never say anything
                    is_open = asyncio.create_task(_until_closed(*self._host_and_port))
                    await asyncio.sleep(PING_EVERY_S)  # whatever lies between may close it always
                else:
                    await asyncio.wait([is_open], timeout=PING_EVERY_S)
                continue
            if not await self._ray_listens():
                return self._tell(NOBODY_LISTENS)
            silent_s = time.monotonic() - answered_s
            if is_open.done() and silent_s > CLOSED_LOST_AFTER_S:
                return self._tell(RAY_HAS_ENDED)
            if silent_s > LINK_LOST_AFTER_S:
                return self._tell(f"the scheduler has not answered for {LINK_LOST_AFTER_S:g} s")
            await asyncio.sleep(RETRY_EVERY_S)

    async def _wait_for_ray(self) -> None:
        """Until something listens at the address: cheaper than to let Ray find out."""
        while not await self._ray_listens():
            self._tell(NOBODY_LISTENS)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _ray_listens(self) -> bool:
        """Whether somebody does at the address; 'auto' is for Ray to find out."""
        return self._address == DEFAULT_ADDRESS or await _listens(*self._host_and_port)

    @property
    def _host_and_port(self) -> tuple[str, int]:
        host, _, port = self._address.rpartition(":")
        return host.strip("[]"), int(port)

    async def _connect(self) -> None:
        """Join Ray and get hold of the actor, started anew if it is gone for good. Raises what Ray raises."""
        arguments = (self._address, self._namespace, self._state_dir)
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            self._handle = await asyncio.to_thread(connect_scheduler, *arguments)
            if self._address == DEFAULT_ADDRESS:
                self._address = joined_address()
            await self._handle.status.remote()

    async def _ping(self) -> bool:
        from ray.exceptions import ActorDiedError, RayError

        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._handle.status.remote()
            return True
        except ActorDiedError:
            try:
                await self._connect()
                return True
            except (TimeoutError, RayError, ConnectionError, ValueError, RuntimeError) as error:
                logger.warning("no new scheduler yet: %s", error)
        except (TimeoutError, RayError, ConnectionError) as error:
            logger.warning("no answer from the scheduler: %s", error)
        return False

    async def _answer(
        self, number: int, method: str, args: list[Any], kwargs: dict[str, Any], timeout_s: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                answer = {"value": await self._call(method, args, kwargs)}
        except LlepError as error:
            answer = {"error": error.code, "message": error.message, "param": error.param}
        except TimeoutError:
            return  # the parent has given up at the same time
        except Exception as error:
            logger.exception("%s failed", method)
            message = f"the scheduler failed in {method}: {_first_line(error)}"
            answer = {"error": LlepError.code, "message": message, "param": None}
        write_frame(self._writer, [number, answer])

    async def _call(self, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Raises the LlepError that the actor raises; while the actor is away, tries again what may be tried again."""
        from ray.exceptions import RayActorError, RayTaskError

        if method == SET_RAY_METRICS:  # for Ray's agents, not for the actor
            return await asyncio.to_thread(self._metrics.set, *args, **kwargs)
        while True:
            try:
                return await getattr(self._handle, method).remote(*args, **kwargs)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, LlepError) else error) from None
            except RayActorError as error:
                if method in TRIED_ONCE:
                    raise SchedulerUnreachable(_first_line(error)) from None
            await asyncio.sleep(RETRY_EVERY_S)

    def _tell(self, problem: str) -> None:
        write_frame(self._writer, [0, problem])


async def _listens(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _until_closed(host: str, port: int) -> None:
    """Until a connection ends: at once when the process there does, in seconds when its machine is gone."""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection(host, port)
        for option, value in KEEPALIVE.items():
            writer.get_extra_info("socket").setsockopt(*option, value)
        try:
            while await reader.read(4096):
                pass
        finally:
            writer.close()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


async def _main(arguments: argparse.Namespace) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=arguments.fd))
    bridge = Bridge(arguments.address, arguments.namespace, arguments.state_dir, writer)
    serving = asyncio.create_task(bridge.serve(reader))
    linking = asyncio.create_task(bridge.keep_link())
    while not serving.done() and not linking.done() and os.getppid() == arguments.parent_pid:
        await asyncio.wait([serving, linking], timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
    if linking.done():
        linking.result()
        await writer.drain()
    # Not by returning: Ray's farewell, and a thread that still joins, can hang when the cluster is gone.
    sys.stderr.flush()
    os._exit(LINK_LOST if linking.done() else ENDED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="open socket to the parent")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--address", required=True, help="Ray's address: host:port or auto")
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    asyncio.run(_main(arguments))


if __name__ == "__main__":
    main()
