"""Does the control plane answer in time while engines report and streams are open, and does its memory stay flat?

`python -m bench.server --append` adds a line to bench/results/server.jsonl; `--minutes 10` for the long run;
`--scrape`: what a scrape of 64 engines takes, and how long other requests wait meanwhile. The
control plane runs as its own process on one core, as `python -m llep_server` does. Another process plays the scheduler,
real but without Ray; a third the engines of 58 x 256, which report to it once a second; this one streams and requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.record import add_record
from llep.errors import ERRORS_BY_CODE, LlepError
from llep.messages import encode
from llep.planning import warm_up
from llep.scheduler.client import read_frame, write_frame

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from reporting import Engine

ENGINES, RANKS, LAYERS, EXPERTS = 8, 8, 58, 256
SCRAPED_ENGINES, SCRAPED_LAYERS, SCRAPED_EXPERTS = 64, 36, 128  # gpt-oss-120b
STREAMS = 100
REQUESTS_PER_S = 200
CONNECTIONS = 32
MEMORY_EVERY_S = 5.0
# The read endpoints and how often each is asked, as a page with its tables and a few scripts do.
PATHS = {
    "/v1/engines": 15,
    "/v1/engines/engine-3": 10,
    "/v1/settings": 10,
    "/v1/settings?engine=engine-1": 5,
    "/v1/settings/schema": 5,
    "/v1/settings/revisions": 5,
    "/v1/loads?window_s=10": 15,
    "/v1/loads?window_s=60&engine=engine-2": 10,
    "/v1/loads/history?engine=engine-4&window_s=300&step_s=5": 5,
    "/v1/loads/matrix?engine=engine-5&by=rank&stage=after": 5,
    "/v1/loads/matrix?engine=engine-6&by=expert": 2,
    "/v1/loads/hot?engine=engine-7&limit=20": 3,
    "/v1/plans": 2,
    "/v1/placement": 3,
    "/v1/advice": 2,
    "/v1/decisions": 3,
    "/v1/recordings": 2,
    "/v1/operations": 2,
    "/v1/events": 10,
    "/livez": 5,
    "/readyz": 3,
    "/metrics": 1,
}


class Caller:
    """Asks the scheduler's process over a socket, as the client of the control plane asks its bridge."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._opening = asyncio.Lock()

    async def call(self, method: str, **arguments: Any) -> Any:
        async with self._opening:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
                self._hearing = asyncio.create_task(self._hear(reader))
        self._number += 1
        answered = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        write_frame(self._writer, [self._number, method, arguments])
        answer = await answered
        if "error" in answer:
            raise ERRORS_BY_CODE.get(answer["error"], LlepError)(answer["message"])
        return answer["value"]

    async def close(self) -> None:
        if self._writer is not None:
            self._hearing.cancel()
            self._writer.close()
            await self._writer.wait_closed()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        while True:
            number, answer = msgspec.msgpack.decode(await read_frame(reader))
            self._waiting.pop(number).set_result(answer)


async def play_scheduler(path: str, state: str) -> None:
    """The real scheduler behind a socket."""
    from llep.scheduler.actor import Scheduler

    scheduler = Scheduler(state)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def answer(number: int, method: str, arguments: dict[str, Any]) -> None:
            try:
                said = {"value": await getattr(scheduler, method)(**arguments)}
            except LlepError as error:
                said = {"error": error.code, "message": error.message}
            write_frame(writer, [number, said])

        tasks: set[asyncio.Task[None]] = set()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                task = asyncio.create_task(answer(*msgspec.msgpack.decode(await read_frame(reader))))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async with await asyncio.start_unix_server(serve, path):
        print("ready", flush=True)
        await asyncio.Event().wait()


async def play_engines(path: str, engines: int, layers: int, experts: int, *, once: bool) -> None:
    """Engines that report once a second, one after the other, or only at the start."""
    numbers = tuple(range(3, 3 + layers))
    running = [
        Engine(name=f"engine-{index}", ep_size=RANKS, layer_numbers=numbers, num_experts=experts)
        for index in range(engines)
    ]
    warm_up()
    caller = Caller(path)
    for turn in itertools.count():
        started_s = time.monotonic()
        for index, engine in enumerate(running):
            engine.run(tokens=64)
            reports = [encode(report) for report in engine.reports()]
            refused = (await caller.call("report", reports=reports, known_revision=0))["refused"]
            assert not refused, refused
            if turn:
                await asyncio.sleep(max(started_s + (index + 1) / engines - time.monotonic(), 0.0))
        if turn == 0:
            print("ready", flush=True)
        if once:
            await asyncio.Event().wait()


def serve_control_plane(path: str) -> None:
    """The control plane on a free port, which is printed."""
    import uvicorn

    from llep_server.app import create_app
    from llep_server.config import ServerConfig
    from llep_server.connections import UVICORN_OPTIONS, settle

    os.sched_setaffinity(0, {0})
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        app = create_app(ServerConfig(state_dir=Path(path).parent), Caller(path))
        settle()
        uvicorn.Server(uvicorn.Config(app, **UVICORN_OPTIONS)).run(sockets=[listener])


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of this module, and the first line that it prints."""
    command = [sys.executable, "-m", "bench.server", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            assert said, f"it ended before it was ready: {' '.join(command)}"
            yield process, said
        finally:
            process.terminate()
            process.wait(timeout=20)


class Connection:
    """One keep-alive connection; a small client, so that what is measured is the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> int:
        """The status, once the whole body is here."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        await reader.readexactly(length)
        return int(lines[0].split()[1])

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


@asynccontextmanager
async def streams(port: int, count: int) -> AsyncIterator[list[int]]:
    """So many listeners to /v1/loads/stream; the events that each has heard."""
    heard = [0] * count

    async def listen(index: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/loads/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        with contextlib.closing(writer):
            while line := await reader.readline():
                heard[index] += line.startswith(b"event: loads")

    tasks = [asyncio.create_task(listen(index)) for index in range(count)]
    try:
        yield heard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ask(port: int, seconds: float, pid: int) -> dict[str, Any]:
    """REQUESTS_PER_S at a steady beat, whatever the answers take; and the server's memory meanwhile."""
    paths = random.Random(0).choices(list(PATHS), list(PATHS.values()), k=int(seconds * REQUESTS_PER_S))
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(Connection(port))
    took_ms: list[tuple[float, str]] = []
    failed: list[str] = []

    async def one(path: str, due_s: float) -> None:
        connection = await free.get()
        try:
            status = await connection.get(path)
            # From when it was due: a server that stalls must not make us ask less.
            took_ms.append(((time.perf_counter() - due_s) * 1e3, path))
            if status != 200:
                failed.append(f"{status} {path}")
        finally:
            free.put_nowait(connection)

    tasks: set[asyncio.Task[None]] = set()
    memory: list[int] = []
    cpu_s, start_s = _cpu_s(pid), time.perf_counter()
    for number, path in enumerate(paths):
        due_s = start_s + number / REQUESTS_PER_S
        await asyncio.sleep(max(due_s - time.perf_counter(), 0))
        task = asyncio.create_task(one(path, due_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if number % int(MEMORY_EVERY_S * REQUESTS_PER_S) == 0:
            memory.append(_rss_bytes(pid))
    await asyncio.gather(*tasks)
    for _ in range(CONNECTIONS):
        await free.get_nowait().close()
    wall_s = time.perf_counter() - start_s
    memory.append(_rss_bytes(pid))
    times = sorted(ms for ms, _ in took_ms)
    by_path = {path: [ms for ms, asked in took_ms if asked == path] for path in PATHS}
    slowest = sorted(((_share(sorted(ms), 0.99), path) for path, ms in by_path.items() if ms), reverse=True)[:3]
    return {
        "seconds": round(wall_s),
        "requests": len(times),
        "requests_per_s": round(len(times) / wall_s, 1),
        "failed": dict(Counter(failed)),
        **{f"p{share:g}_ms": round(_share(times, share / 100), 1) for share in (50, 95, 99)},
        "max_ms": round(times[-1], 1),
        "slowest_p99_ms": {path: round(ms, 1) for ms, path in slowest},
        "cpu_share": round((_cpu_s(pid) - cpu_s) / wall_s, 3),
        # The first quarter fills caches and buffers: flat is what comes after.
        "rss_mib": [round(memory[at] / 2**20, 1) for at in (0, len(memory) // 4, len(memory) // 2, -1)],
    }


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(port: int, seconds: float, pid: int) -> dict[str, Any]:
    async with streams(port, STREAMS) as heard:
        await asyncio.sleep(3)
        before = list(heard)
        found = await ask(port, seconds, pid)
        events = [(after - start) / found["seconds"] for start, after in zip(before, heard, strict=True)]
    return {
        **{"engines": ENGINES, "ranks": RANKS, "layers": LAYERS, "experts": EXPERTS, "streams": STREAMS},
        **found,
        "events_per_s_and_stream": round(statistics.mean(events), 2),
    }


async def measure_scrapes(port: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a scrape, and the longest that another request waited: without scrapes, and with one a second."""
    probe = Connection(port)
    scrapes_ms: list[float] = []

    async def probe_for(probing_s: float) -> list[float]:
        waits_ms, end_s = [], time.perf_counter() + probing_s
        while time.perf_counter() < end_s:
            started_s = time.perf_counter()
            assert await probe.get("/livez") == 200
            waits_ms.append((time.perf_counter() - started_s) * 1e3)
            await asyncio.sleep(0.002)
        return sorted(waits_ms)

    async def scrape() -> None:
        scraper = Connection(port)
        while True:
            started_s = time.perf_counter()
            assert await scraper.get("/metrics") == 200
            scrapes_ms.append((time.perf_counter() - started_s) * 1e3)
            await asyncio.sleep(1.1)  # a page is kept for a second

    for path in ("/livez", "/metrics"):  # what the first request of a process makes is no part of it
        assert await probe.get(path) == 200
    quiet_ms = await probe_for(seconds)
    scraping = asyncio.create_task(scrape())
    busy_ms = await probe_for(seconds)
    scraping.cancel()
    await asyncio.gather(scraping, return_exceptions=True)
    return {
        **{"engines": SCRAPED_ENGINES, "ranks": RANKS, "layers": SCRAPED_LAYERS, "experts": SCRAPED_EXPERTS},
        **{"scrapes": len(scrapes_ms), "scrape_p50_ms": round(statistics.median(scrapes_ms), 1)},
        "scrape_max_ms": round(max(scrapes_ms), 1),
        **{f"other_{name}_max_ms": round(ms[-1], 1) for name, ms in (("quiet", quiet_ms), ("scraped", busy_ms))},
        **{
            f"other_{name}_p99_ms": round(_share(ms, 0.99), 1)
            for name, ms in (("quiet", quiet_ms), ("scraped", busy_ms))
        },
    }


def run_scrapes(seconds: float) -> dict[str, Any]:
    shape = (f"--count={SCRAPED_ENGINES}", f"--layers={SCRAPED_LAYERS}", f"--experts={SCRAPED_EXPERTS}", "--once")
    with playing(*shape) as (_, port):
        return asyncio.run(measure_scrapes(port, seconds))


def run(seconds: float) -> dict[str, Any]:
    with playing() as (server, port):
        return asyncio.run(measure(port, seconds, server.pid))


@contextlib.contextmanager
def playing(*engines: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Scheduler, engines and control plane, each in a process; that of the control plane, and its port."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/scheduler"
        stack.enter_context(child("--scheduler", path, "--state", f"{folder}/state"))
        stack.enter_context(child("--engines", path, *engines))
        server, port = stack.enter_context(child("--serve", path))
        yield server, int(port)


def _scheduling() -> dict[str, Any]:
    """Real time (`chrt -r 10`) keeps what else runs on a busy machine out of what is measured."""
    return {"is_real_time": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true", help="add the line to bench/results/server.jsonl")
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--scheduler", help=argparse.SUPPRESS)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--scrape", action="store_true", help="measure scrapes instead")
    parser.add_argument("--engines", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=LAYERS, help=argparse.SUPPRESS)
    parser.add_argument("--experts", type=int, default=EXPERTS, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scheduler:
        asyncio.run(play_scheduler(arguments.scheduler, arguments.state))
    elif arguments.engines:
        shape = (arguments.count, arguments.layers, arguments.experts)
        asyncio.run(play_engines(arguments.engines, *shape, once=arguments.once))
    elif arguments.serve:
        serve_control_plane(arguments.serve)
    elif arguments.scrape:
        add_record("server", {"what": "scrape", **_scheduling(), **run_scrapes(20.0)}, append=arguments.append)
    else:
        add_record("server", {"what": "load", **_scheduling()} | run(60 * arguments.minutes), append=arguments.append)


if __name__ == "__main__":
    main()
