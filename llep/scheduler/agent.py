"""`python -m llep.scheduler.agent`: the process beside an engine that carries its reports and directives.

Workers (ZMQ DEALER) connect to its ROUTER and send encoded Reports; it sends them encoded Directives. It keeps the
newest of each only, so nothing can pile up. A worker that reports seldom sends an empty frame every second or two: an
agent that doesn't know it, for it has just started, answers with an empty frame, which asks for a report at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from llep.errors import LlepError, SchedulerUnreachable
from llep.messages import ReportHeader, decode_directive, decode_header
from llep.scheduler.admit import Refusal
from llep.scheduler.client import SchedulerClient
from llep.scheduler.uploads import Uploads
from llep.spool import spool_dir

logger = logging.getLogger("llep.agent")

GATHER_S = 0.01  # ranks report at about the same time: one call for all
REPORT_TIMEOUT_S = 5.0
POLL_S = 20.0
RETRY_S = 0.5
UNREADABLE_RETRY_S = 10.0  # a scheduler of another version answers at once, again and again
LOOK_AROUND_EVERY_S = 0.5
SILENCE_LIMIT_S = 1800.0
LONGEST_SOCKET_PATH = 107  # of a unix socket on Linux
MOST_REPORT_BYTES = 64 << 20
RESEND_AFTER_S = 1.0
DEAD_AFTER_S = 60.0


@dataclass(slots=True)
class Worker:
    """What the agent keeps of one rank: its newest report and where to send directives."""

    identity: bytes
    header: ReportHeader
    report: bytes
    arrived_s: float
    is_new: bool = True  # not yet at the scheduler
    told_s: float = float("-inf")  # when it was last sent a directive

    @property
    def is_fresh(self) -> bool:
        """Whether the report still says something about now."""
        interval_s = self.header.live_settings.get("report_interval_s", 1.0)
        return time.monotonic() - self.arrived_s < max(30.0, 5 * float(interval_s))


class Agent:
    """Carries reports of one engine up and directives down, with or without a scheduler to be found."""

    def __init__(self, engine: str, router: zmq.asyncio.Socket, client: SchedulerClient) -> None:
        self._engine = engine
        self._router = router
        self._client = client
        self._workers: dict[int, Worker] = {}
        self._incarnation = ""
        self._directive = b""
        self._revision = 0
        self._has_news = asyncio.Event()
        self._heard_s = time.monotonic()
        self._complaints: set[str] = set()
        self._left_out: Counter[str] = Counter()  # reports that can't be brought, by Refusal; not yet told

    @property
    def silent_s(self) -> float:
        """Seconds since a worker last said something."""
        return time.monotonic() - self._heard_s

    async def receive(self) -> None:
        """Take what workers send, for ever."""
        while True:
            identity, *frames = await self._router.recv_multipart()
            self._heard_s = time.monotonic()
            if not frames or not frames[-1]:
                if identity not in (worker.identity for worker in self._workers.values()):
                    await self._router.send_multipart([identity, b""])
                continue
            try:
                header = decode_header(frames[-1])
            except ValueError as error:
                self._leave_out(Refusal.GARBLED, f"a worker's report is garbled and left out: {error}")
                continue
            if header.info.engine != self._engine:
                why = f"a report of engine {header.info.engine} came to the agent of {self._engine}: left out"
                self._leave_out(Refusal.ENGINE, why)
                continue
            await self._take(identity, header, frames[-1])

    async def forward(self) -> None:
        """Bring the newest reports to the scheduler, for ever; what can't be brought is replaced by what is newer."""
        while True:
            await self._has_news.wait()
            await asyncio.sleep(GATHER_S)
            self._has_news.clear()
            batch = [worker for worker in self._workers.values() if worker.is_new and worker.is_fresh]
            if not batch and not self._left_out:
                continue
            for worker in batch:
                worker.is_new = False
            left_out, self._left_out = self._left_out, Counter()
            try:
                # Rank 0 last: with its report the scheduler adds up what the ranks have said.
                reports = [worker.report for worker in sorted(batch, key=lambda worker: -worker.header.rank)]
                arguments = (reports, self._revision, *([dict(left_out)] if left_out else []))
                answer = await self._client.call("report", *arguments, timeout_s=REPORT_TIMEOUT_S)
            except LlepError as error:
                self._left_out += left_out
                self._say_why(error)
                await self._bring_all_again()
                continue
            for refusal in answer["refused"]:
                self._complain(f"the scheduler refused a report: {refusal}")
            await self._hand_out(answer["directive"])

    async def listen(self) -> None:
        """Wait for directives, for ever. A lost link means that a scheduler without memory may be next."""
        while True:
            if not self._incarnation:
                await asyncio.sleep(LOOK_AROUND_EVERY_S)
                continue
            arguments = (self._engine, self._incarnation, self._revision, POLL_S)
            try:
                directive = await self._client.call("wait_directive", *arguments, timeout_s=POLL_S + REPORT_TIMEOUT_S)
            except LlepError as error:
                self._say_why(error)
                await self._bring_all_again()
                continue
            if not await self._hand_out(directive):
                await asyncio.sleep(UNREADABLE_RETRY_S)

    def spool(self) -> Path | None:
        """Where rank 0 keeps recordings, once it has reported here; None beside an engine's other machines."""
        rank_0 = self._workers.get(0)
        return spool_dir(str(rank_0.header.live_settings.get("record_dir", ""))) if rank_0 is not None else None

    async def _take(self, identity: bytes, header: ReportHeader, report: bytes) -> None:
        if header.incarnation != self._incarnation:
            logger.info("engine %s reports (incarnation %s)", self._engine, header.incarnation)
            self._workers.clear()
            self._incarnation, self._directive, self._revision = header.incarnation, b"", 0
        known = self._workers.get(header.rank)
        told_s = known.told_s if known is not None and known.identity == identity else float("-inf")
        worker = Worker(identity, header, report, time.monotonic(), told_s=told_s)
        self._workers[header.rank] = worker
        self._has_news.set()
        if header.held_revision < self._revision and time.monotonic() - told_s > RESEND_AFTER_S:
            await self._send_directive(worker)

    async def _hand_out(self, directive: bytes | None) -> bool:
        """Send a directive to every worker if it is newer than the last. Whether it could be read."""
        if directive is None:
            return True
        try:
            revision = decode_directive(directive).revision
        except ValueError as error:
            self._complain(f"a directive of the scheduler can't be read, the engine runs on as it is: {error}")
            return False
        if revision <= self._revision:
            return True
        logger.info("revision %d for engine %s", revision, self._engine)
        self._directive, self._revision = directive, revision
        for worker in self._workers.values():
            await self._send_directive(worker)
        return True

    async def _send_directive(self, worker: Worker) -> None:
        worker.told_s = time.monotonic()
        await self._router.send_multipart([worker.identity, self._directive])

    async def _bring_all_again(self) -> None:
        """After a pause: a scheduler that started anew knows nothing."""
        await asyncio.sleep(RETRY_S)
        for worker in self._workers.values():
            worker.is_new = True
        self._has_news.set()

    def _say_why(self, error: LlepError) -> None:
        if not isinstance(error, SchedulerUnreachable):  # the client says that itself, once
            self._complain(error.message)

    def _leave_out(self, reason: Refusal, why: str) -> None:
        self._complain(why)
        self._left_out[str(reason)] += 1
        self._has_news.set()

    def _complain(self, message: str) -> None:
        """Once for each message."""
        if message not in self._complaints and len(self._complaints) < 100:
            self._complaints.add(message)
            logger.warning("%s", message)


def bind(path: str) -> zmq.asyncio.Socket:
    """A ROUTER at a unix socket; one that a dead agent left behind is replaced. Raises LlepError."""
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise LlepError(f"--socket {path} is longer than the {LONGEST_SOCKET_PATH} bytes of a unix socket's path")
    router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.MAXMSGSIZE, MOST_REPORT_BYTES)
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_dead_sockets(Path(path).parent)
        router.bind(f"ipc://{path}")
    except (OSError, zmq.ZMQError) as error:
        router.close()
        raise LlepError(f"--socket {path} can't be bound: {error}") from None
    return router


def _remove_dead_sockets(folder: Path) -> None:
    """Those of engines that are gone: an agent that is killed with its engine leaves its socket behind."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            is_old = time.time() - path.stat().st_mtime > DEAD_AFTER_S  # a new one may not listen yet
            if is_old and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()


async def run(engine: str, socket_path: str, parent_pid: int, silence_limit_s: float) -> None:
    """Until the parent is gone, nobody has reported for silence_limit_s, or SIGTERM. Raises LlepError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    router = bind(socket_path)
    try:
        async with SchedulerClient() as client:
            agent = Agent(engine, router, client)
            uploads = Uploads(engine, client, agent.spool)
            works = (agent.receive(), agent.forward(), agent.listen(), uploads.run())
            tasks = [asyncio.create_task(work) for work in works]
            try:
                while not (why := _why_end(stop, parent_pid, agent.silent_s, silence_limit_s)):
                    done, _ = await asyncio.wait(
                        tasks, timeout=LOOK_AROUND_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        task.result()  # they never end but by an error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            logger.info("the agent of engine %s ends: %s", engine, why)
    finally:
        router.close()


def _why_end(stop: asyncio.Event, parent_pid: int, silent_s: float, silence_limit_s: float) -> str:
    if stop.is_set():
        return "it was told to"
    if not _is_alive(parent_pid):
        return f"process {parent_pid}, which started it, is gone"
    if silent_s > silence_limit_s:
        return f"no worker has reported for {silence_limit_s:g} s"
    return ""


def _is_alive(pid: int) -> bool:
    if os.getppid() == pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # a process that has ended but not been waited for
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llep.scheduler.agent", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the unix socket that workers connect to")
    parser.add_argument("--engine", required=True, help="the engine's name")
    parser.add_argument("--parent-pid", type=int, required=True, help="the agent ends when this process has ended")
    parser.add_argument(
        "--silence-limit-s", type=float, default=SILENCE_LIMIT_S, help="ends when nobody reports for so long"
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(asctime)s llep agent: %(message)s", datefmt="%m-%d %H:%M:%S")
    logging.getLogger("llep").setLevel(logging.INFO)
    try:
        asyncio.run(run(arguments.engine, arguments.socket, arguments.parent_pid, arguments.silence_limit_s))
    except LlepError as error:
        logger.error("%s", error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
