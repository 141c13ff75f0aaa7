"""The layer's throughput on this machine: ranks of one core each over gloo, sharded tokens, float32 SwiGLU experts.

For each scenario the same layer runs, in turn: plain EP, llep's planner, and plain EP on force-balanced routing, which
is the ideal. Prints, and with --append keeps, one JSON line a scenario. Peaks are of resident memory, per rank. Where
others use the machine too, `_cpu` is what to look at: the processor time of the rank that needs most, waits left out.

    python -m bench.layer [--sweep scenario|tokens|hidden|experts|alpha|lambda] [--ranks 2] [--repeats 9] [--append]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.record import add_record
from llep.config import Planner, Settings
from llep.moe.layer import LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import Transport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.planning.policy import Step, decide
from tests.dist.ranks import start_ranks

WAYS = ("plain", "llep", "ideal")


@dataclass(frozen=True)
class Case:
    """`share` of the tokens choose their experts among the first `hot` (all of them, or as many as there are)."""

    share: float = 0.0
    hot: int = 0
    tokens: int = 2048  # of each rank
    hidden: int = 1024
    experts: int = 32
    top_k: int = 4
    alpha: float = 1.0
    threshold: float = 1.05


SKEWED = Case(0.8, 4)
SWEEPS: dict[str, list[Case]] = {
    "scenario": [Case(), Case(0.3, 4), SKEWED, Case(0.95, 4), Case(0.95, 1)],
    "tokens": [replace(SKEWED, tokens=tokens) for tokens in (128, 512, 1024, 4096)],
    "hidden": [replace(SKEWED, hidden=hidden) for hidden in (256, 512, 2048)],
    "experts": [replace(SKEWED, experts=experts) for experts in (8, 16, 64)],
    "alpha": [replace(SKEWED, alpha=alpha) for alpha in (1.1, 1.2, 1.5)],
    "lambda": [replace(Case(share, 4), threshold=at) for share in (0.3, 0.8) for at in (1.1, 1.3, 1.5)],
}


def choose_experts(case: Case, seed: int, *, is_balanced: bool) -> torch.Tensor:
    """Distinct expert ids [T, K]; balanced: each expert gets as many, dealt out in turn."""
    rng = np.random.default_rng(seed)
    if is_balanced:
        first_T = np.arange(case.tokens) * case.top_k
        return torch.from_numpy((first_T[:, None] + np.arange(case.top_k)) % case.experts)
    scores = rng.random((case.tokens, case.experts))
    scores[:, : case.hot] += rng.random((case.tokens, 1)) < case.share
    return torch.from_numpy(np.argsort(-scores, axis=1)[:, : case.top_k].copy())


def make_layer(case: Case, transport: Transport) -> LeastLoadedMoE:
    placement = Placement.linear(case.experts, transport.size, 0)
    local = case.experts // transport.size
    generator = torch.Generator().manual_seed(transport.rank)
    gate_up = torch.randn(local, 2 * case.hidden, case.hidden, generator=generator) / case.hidden**0.5
    down = torch.randn(local, case.hidden, case.hidden, generator=generator) / case.hidden**0.5
    experts = SwigluExperts(gate_up, down)
    pool = LendingPool.reserve(experts.weights, min(4, local))
    local_ids = [expert % local for expert in range(case.experts)]
    workspace = Workspace.for_batches(case.tokens, case.top_k, transport.size, transport.device, is_replicated=False)
    return LeastLoadedMoE(experts, transport, pool, placement.home_rank, local_ids, workspace)


def settings_of(case: Case, way: str) -> Settings:
    return Settings(
        planner=Planner.QUOTA if way == "llep" else Planner.HOME,
        imbalance_threshold=case.threshold,
        capacity_factor=case.alpha,
        min_chunk_tokens=64,
        min_batch_tokens=0,
    )


def measure(rank: int, size: int, case: Case, repeats: int) -> dict[str, Any]:
    """Medians of the step's seconds (the slowest rank's) and peak bytes (the highest rank's) for each way."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]})  # type: ignore[operator]
    layer = make_layer(case, Transport(range(size), torch.device("cpu")))
    hidden = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(rank))
    gates = torch.full((case.tokens, case.top_k), 1 / case.top_k)
    skewed, balanced = (choose_experts(case, rank, is_balanced=is_balanced) for is_balanced in (False, True))
    if not case.hot:
        skewed = balanced
    placement = Placement(layer.home_rank, (layer.pool.slots,) * size)
    lends = ratio = 0.0

    def step(way: str) -> None:
        nonlocal lends, ratio
        settings = settings_of(case, way)
        ids = balanced if way == "ideal" else skewed
        prefill = Step("prefill", size * case.tokens)
        result = layer.forward_sharded(
            hidden, gates, ids, lambda counts: decide(settings, prefill, 0, counts, placement, 1 << 20)
        )
        if way == "llep":
            lends = len(result.plan.lends)
        if way == "plain":
            loads = result.plan.rank_loads
            ratio = max(loads) * size / max(sum(loads), 1)

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks = {way: 0 for way in WAYS}
    for repeat in range(repeats + 1):
        first = repeat % len(WAYS)  # who comes next finds other caches: each has its turn
        for way in (*WAYS[first:], *WAYS[:first]):
            _reset_peak()
            before = _peak_bytes()
            dist.barrier()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            step(way)
            took = time.perf_counter() - start_s, time.process_time() - start_cpu_s, _peak_bytes() - before
            spent = torch.tensor(took, dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            if repeat:
                seconds[way].append(float(spent[0]))
                cpu_seconds[way].append(float(spent[1]))
                peaks[way] = max(peaks[way], int(spent[2]))
    medians = {way: statistics.median(seconds[way]) for way in WAYS}
    # Noise comes in bursts: what is compared is compared within a round.
    of = {
        name + suffix: round(statistics.median(b / a for a, b in zip(times["llep"], times[way], strict=True)), 4)
        for suffix, times in (("", seconds), ("_cpu", cpu_seconds))
        for name, way in (("speedup", "plain"), ("of_ideal", "ideal"))
    }
    reserved = layer.pool.bytes + layer.workspace.bytes
    return {
        **{f"{way}_ms": round(1e3 * medians[way], 2) for way in WAYS},
        **of,
        "ratio_before": round(ratio, 3),
        "lends": int(lends),
        "reserved_bytes": reserved,
        **{f"{way}_peak_bytes": peaks[way] for way in WAYS},
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=[*SWEEPS, "all"], default="scenario")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/layer.jsonl")
    arguments = parser.parse_args()
    for sweep in SWEEPS if arguments.sweep == "all" else [arguments.sweep]:
        for case in SWEEPS[sweep]:
            found = start_ranks(measure, arguments.ranks, case, arguments.repeats, timeout_s=600)[0]
            record = {"sweep": sweep, "ranks": arguments.ranks, **asdict(case), **found}
            add_record("layer", record, append=arguments.append)


if __name__ == "__main__":
    main()
