"""What reports and directives cost a worker: two real ranks, with reports against none, in turn.

Each rank runs the layers of a model as large as DeepSeek's in what is counted (58 layers, 256 experts), with small
experts, and does in every step what a worker does: agree, follow the placement, plan, count. Its courier sends reports
to a socket and takes directives from it. On: ten reports and ten directives a second; off: neither. What that costs is
divided by ten, for one a second, as is usual: at ten it stands out of the machine's own noise. One JSON line.

    python -m bench.overhead [--minutes 3] [--append]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import zmq

from bench.record import add_record
from llep.config import Settings
from llep.loads import home_loads
from llep.messages import PROTOCOL, Directive, Report, encode
from llep.moe.agreement import CLOCK_US, HEADER_SIZE, WEIGHTS, AgreedSettings, agreed_step
from llep.moe.layer import LeastLoadedMoE
from llep.moe.replicas import Replicas
from llep.moe.slots import LendingPool
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import Transport
from llep.moe.window import LayerStep, LoadWindow
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.planning import warm_up
from llep.planning.policy import decide
from llep.vllm_plugin.courier import Courier
from tests.dist.ranks import start_ranks
from tests.server.reporting import Engine

RANKS, LAYERS, EXPERTS, TOP_K = 2, 58, 256, 8
HIDDEN, INTERMEDIATE, TOKENS, SLOTS = 64, 32, 256, 4
RATE = 10  # reports and directives a second
BLOCK_S = 2.0
OFF_S = 300.0


class Step(NamedTuple):
    is_on: bool  # reports are sent
    seconds: float
    processor_s: float


class Worker:
    """One rank: its layers, and what llep.vllm_plugin.rank does around them."""

    def __init__(self, rank: int, size: int) -> None:
        warm_up()
        self.transport = Transport(range(size), torch.device("cpu"), watchdog_s=60)
        self.replicas = Replicas(self.transport)
        self.agreed = AgreedSettings(_settings(OFF_S), self.replicas.check)
        home = Placement.linear(EXPERTS, size, SLOTS)
        generator = torch.Generator().manual_seed(rank)
        local = EXPERTS // size
        pool: LendingPool | None = None
        workspace = Workspace(2048, 4096)
        for _ in range(LAYERS):
            experts = SwigluExperts(
                torch.randn(local, 2 * INTERMEDIATE, HIDDEN, generator=generator),
                torch.randn(local, HIDDEN, INTERMEDIATE, generator=generator),
            )
            pool = pool or LendingPool.reserve(experts.weights, SLOTS)
            rows = [expert % local for expert in range(EXPERTS)]
            moe = LeastLoadedMoE(experts, self.transport, pool, home.home_rank, rows, workspace)
            self.replicas.add_layer(moe, home)
        self.window = LoadWindow(np.tile(home.home_rank, (LAYERS, 1)), size, TOP_K, 1)
        self._template = Engine(
            ep_size=size, layer_numbers=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K
        ).reports()[rank]
        self._batches = [_routing(np.random.default_rng([rank, n])) for n in range(8)]
        self._hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
        self._gates = torch.full((TOKENS, TOP_K), 1 / TOP_K)

    def step(self, number: int) -> float:
        """One forward pass; -> seconds of the host in agreeing and following, without waiting for others."""
        start_s = time.perf_counter()
        header = self.agreed.header(number, TOKENS, is_dummy=False, is_prefill=True)
        own_s = time.perf_counter() - start_s
        headers = self.transport.gather(torch.from_numpy(header), "agreement").numpy().reshape(-1, HEADER_SIZE)
        start_s = time.perf_counter()
        self.agreed.agree(headers)
        weights = headers[:, WEIGHTS].tolist()
        self.replicas.follow(self.agreed.live.placement, headers[0, CLOCK_US] / 1e6, weights, may_fill=True)
        step, _ = agreed_step(headers, is_replicated=False)
        own_s += time.perf_counter() - start_s
        for layer, placed in enumerate(self.replicas.layers):
            ids = self._batches[(number + layer) % len(self._batches)]
            choose = partial(
                decide, self.agreed.live.settings, step, layer, placement=placed.placement, bytes_per_expert=1
            )
            start_s = time.perf_counter()
            result = placed.moe.forward_sharded(self._hidden, self._gates, ids, choose)
            seconds = time.perf_counter() - start_s
            loads = home_loads(result.counts_RE.sum(axis=0), placed.home.home_rank, placed.home.ep_size)
            self.window.record(
                LayerStep(
                    step=number,
                    phase=step.phase,
                    layer=layer,
                    counts_RE=result.counts_RE,
                    planned=result.plan,
                    home_loads=loads,
                    is_moved=True,
                    is_verified=False,
                    times=result.times,
                    seconds=seconds,
                )
            )
        return own_s

    def report(self) -> Report:
        with self.window.lock:
            return msgspec.structs.replace(
                self._template,
                held_revision=self.agreed.held.number,
                live_revision=self.agreed.live.number,
                live_settings=self.agreed.live.settings.dump(),
                phase_seconds=self.window.phase_seconds(),
                layer_seconds=dict(self.window.layer_seconds),
                worth=self.window.worth(),
                group=self.window.group_loads() if self.transport.rank == 0 else None,
            )


def _routing(rng: np.random.Generator) -> torch.Tensor:
    """Expert ids [T, K] of few experts on each rank: a batch is computed expert by expert here."""
    chosen = rng.choice(EXPERTS, size=2 * TOP_K, replace=False)
    places = rng.random((TOKENS, len(chosen))).argsort(axis=1)[:, :TOP_K]
    return torch.from_numpy(chosen[places])


def _settings(report_interval_s: float) -> Settings:
    return Settings(report_interval_s=report_interval_s, min_batch_tokens=0)


def run_rank(rank: int, size: int, socket: str, seconds: float) -> dict[str, Any]:
    worker = Worker(rank, size)
    courier = Courier(socket, worker.report, worker.agreed, worker.replicas, None)
    courier.start()
    steps: list[Step] = []
    own: list[float] = []
    courier_s = time.pthread_getcpuclockid(courier.ident or 0)
    end = torch.zeros(1, dtype=torch.int64)
    begin_s = time.monotonic()
    with torch.inference_mode():
        for number in itertools.count(1):
            start_s, start_busy_s = time.perf_counter(), time.process_time()
            own.append(worker.step(number))
            is_on = worker.agreed.live.settings.report_interval_s < OFF_S
            steps.append(Step(is_on, time.perf_counter() - start_s, time.process_time() - start_busy_s))
            end[0] = time.monotonic() - begin_s > seconds
            if number % 20 == 0 and int(worker.transport.gather(end, "end").max()):
                break
    on_s = sum(step.seconds for step in steps if step.is_on)
    return {"steps": steps, "own_s": statistics.mean(own), "courier_share": time.clock_gettime(courier_s) / on_s}


def talk(socket: zmq.Socket[bytes], stop: threading.Event, sizes: list[int]) -> None:
    """The agent's end: takes reports; a directive to every rank each second while they are on, and to switch."""
    peers: dict[bytes, None] = {}
    revision, is_on, next_switch_s, next_directive_s = 0, False, 0.0, 0.0
    while not stop.is_set():
        if socket.poll(50):
            identity, data = socket.recv_multipart()
            if identity not in peers:
                peers[identity] = None
                socket.send_multipart([identity, b""])
            if data:
                sizes.append(len(data))
        now = time.monotonic()
        if len(peers) < RANKS:
            continue
        if now >= next_switch_s:
            is_on, next_switch_s, next_directive_s = not is_on, now + BLOCK_S, now
        elif not is_on or now < next_directive_s:
            continue
        revision += 1
        next_directive_s = now + 1.0 / RATE
        settings = _settings(1.0 / RATE if is_on else OFF_S).dump()
        directive = Directive(protocol=PROTOCOL, engine="e", revision=revision, settings=settings)
        for identity in peers:
            socket.send_multipart([identity, encode(directive)])


def shares(steps: Sequence[Step]) -> tuple[list[float], list[float]]:
    """How much longer steps with reports take than those of the blocks without before and after: by the clock, and in
    processor time of the rank, which other programs on the machine disturb less."""
    found = [(is_on, list(block)) for is_on, block in itertools.groupby(steps, key=lambda step: step.is_on)]
    whole = [(is_on, block) for is_on, block in found if sum(step.seconds for step in block) > 0.8 * BLOCK_S]
    triples = [
        (before + after, on)
        for (was_on, before), (is_on, on), (goes_on, after) in zip(whole, whole[1:], whole[2:], strict=False)
        if is_on and not was_on and not goes_on
    ]
    by_clock, by_processor = (
        [
            statistics.mean(step[column] for step in on) / statistics.mean(step[column] for step in off) - 1
            for off, on in triples
        ]
        for column in (1, 2)
    )
    return by_clock, by_processor


def _median_and_error(shares: Sequence[float]) -> list[float]:
    """The median, and its standard error as that of normal noise."""
    error = 1.25 * statistics.stdev(shares) / len(shares) ** 0.5
    return [round(statistics.median(shares), 5), round(error, 5)]


def measure(minutes: float) -> dict[str, Any]:
    sizes: list[int] = []
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "agent.sock")
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.bind(f"ipc://{path}")
        thread = threading.Thread(target=talk, args=(socket, stop, sizes), daemon=True)
        thread.start()
        results = start_ranks(run_rank, RANKS, path, 60 * minutes, timeout_s=60 * minutes + 120)
        stop.set()
        thread.join()
        socket.close(0)
    by_clock, by_processor = zip(*(shares(each["steps"]) for each in results), strict=True)
    step_s = statistics.median(step.seconds for step in results[0]["steps"])
    return {
        "case": "reports and directives",
        "ranks": RANKS,
        "layers": LAYERS,
        "experts": EXPERTS,
        "step_ms": round(1000 * step_s, 2),
        "blocks": len(by_clock[0]),
        "reports_per_s": RATE,
        "report_bytes": max(sizes),
        "share_as_measured": _median_and_error(by_clock[0]),
        "processor_share_as_measured": _median_and_error(by_processor[0]),
        # At one report and one directive a second:
        "share_of_step": round(statistics.median(by_clock[0]) / RATE, 5),
        "share_of_processor_time": round(statistics.median(by_processor[0]) / RATE, 5),
        "courier_processor_share": round(max(each["courier_share"] for each in results) / RATE, 5),
        "agree_and_follow_share": round(max(each["own_s"] for each in results) / step_s, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--append", action="store_true", help="keep the line in bench/results/overhead.jsonl")
    arguments = parser.parse_args()
    add_record("overhead", measure(arguments.minutes), append=arguments.append)


if __name__ == "__main__":
    main()
