"""Measures what a cost model is made of, on this machine's device: experts' work and the lending of weights.

The experts are llep's own in plain torch, the lends go through the transport that serving uses.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from llep.cost import Link
from llep.errors import LlepError
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import Transport, join
from llep.placement import Placement
from llep.plan import Decision, Plan, Segment

EXPERTS = 4  # measured together: enough that one expert's weights are not in a cache when its turn comes again
LEND_BYTES = (1 << 16, 1 << 20, 1 << 23, 1 << 26)
MIN_REPEATS, MAX_REPEATS, POINT_S = 5, 200, 0.3  # bounds on the runs of one point
LEND_TIMEOUT_S = 120.0


class CalibrationError(LlepError):
    """A measurement can't be made here."""

    code = "calibration"


@dataclass(frozen=True, slots=True)
class Gemm:
    """One expert's seconds by tokens, never falling, and what a call costs besides."""

    expert_bytes: int
    curve: tuple[tuple[int, float], ...]
    launch_s: float


def measure_gemm(
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Sequence[int],
    on_point: Callable[[int], None] = lambda tokens: None,
) -> Gemm:
    """Time SwiGLU experts of that shape with each number of tokens, one alone and EXPERTS together.

    What EXPERTS need more than one is their work; what one needs beyond its share of that is the call's.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=device, generator=generator, dtype=torch.float32) / hidden**0.5
        cast: torch.Tensor = values.to(dtype)
        return cast

    experts = SwigluExperts(random(EXPERTS, 2 * intermediate, hidden), random(EXPERTS, hidden, intermediate))
    curve: list[tuple[int, float]] = []
    launches_s: list[float] = []
    for count in tokens:
        one_s, all_s = (_compute_s(experts, number, count, random(number * count, hidden)) for number in (1, EXPERTS))
        work_s = (all_s - one_s) / (EXPERTS - 1)
        launches_s.append(one_s - work_s)
        # Noise must not make more tokens cheaper: a curve that falls would make planners split what is better whole.
        curve.append((count, max(work_s, curve[-1][1] if curve else 1e-9)))
        on_point(count)
    expert_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in experts.weights.values())
    return Gemm(expert_bytes, tuple(curve), max(statistics.median(launches_s), 0.0))


def _compute_s(experts: SwigluExperts, number: int, tokens: int, rows_PH: torch.Tensor) -> float:
    experts_G, counts_G = np.arange(number), np.full(number, tokens)
    gates_P = rows_PH.new_ones(len(rows_PH))
    return _least_s(lambda: experts.compute(experts.weights, rows_PH, experts_G, counts_G, gates_P), rows_PH.device)


def _least_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the runs that fit into POINT_S: what else runs on the machine can only slow one."""
    least_s = math.inf
    end_s = time.perf_counter() + 2 * POINT_S
    for number in range(2 + MAX_REPEATS):
        if number >= 2 + MIN_REPEATS and time.perf_counter() > end_s:
            break
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            least_s = min(least_s, time.perf_counter() - start_s)
    return least_s


def measure_link(device_type: str) -> Link:
    """Lend between two ranks on this machine, as serving does; on CUDA between two devices. CalibrationError else."""
    if device_type == "cuda" and torch.cuda.device_count() < 2:
        raise CalibrationError("two CUDA devices are needed to measure the link between them")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_lend, args=(rank, str(Path(folder) / "store"), device_type, sender), daemon=True)
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            return _link(_received(receiver, [process.sentinel for process in ranks]))
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _received(receiver: Connection, sentinels: Sequence[int]) -> list[float]:
    ready = wait([receiver, *sentinels], LEND_TIMEOUT_S)
    if receiver not in ready:
        raise CalibrationError("the ranks that measure lends ended, or did not answer; their output says why")
    times_s: list[float] = receiver.recv()
    return times_s


def _lend(rank: int, store: str, device_type: str, sender: Connection) -> None:
    """One of the two ranks: rank 0 lends to rank 1, which tells the least seconds for each of LEND_BYTES."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    join(rank, 2, store, device)
    transport = Transport((0, 1), device)
    plan = Plan(Decision.LEND, Placement(home_rank=(0,), free_slots=(0, 1)), [Segment(0, 1, 0, 1)])
    times_s = []
    for size in LEND_BYTES:
        weights = {"weights": torch.zeros(1, size, dtype=torch.uint8, device=device)}
        ready = torch.zeros(1, device=device)

        def lend(weights: dict[str, torch.Tensor] = weights, ready: torch.Tensor = ready) -> float:
            transport.gather(ready, "start of a lend")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start_s = time.perf_counter()
            transport.start_lends(plan, weights, [0], weights).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start_s

        times_s.append(min([lend() for _ in range(2 + 2 * MIN_REPEATS)][2:]))
    if rank == 1:
        sender.send(times_s)
    transport.gather(torch.zeros(1, device=device), "end")


def _link(times_s: Sequence[float]) -> Link:
    """Latency from the smallest lend, rate from what the largest needs more."""
    more_s = max(times_s[-1] - times_s[0], 1e-9)
    rate = (LEND_BYTES[-1] - LEND_BYTES[0]) / more_s
    return Link(latency_s=max(times_s[0] - LEND_BYTES[0] / rate, 0.0), bytes_per_s=rate)
