"""How long does a plan take, from the Python call to the plan? One core, after warm_up.

Each of 20 batches is planned 200 times; p50_us is the median over batches of their medians, p99_us of their 99th
percentiles. cpu_*: the same of the thread's own CPU time, which other processes on the core don't count into.
`all`: with resident replicas, nodes of 8 ranks, byte limits and the H200's cost model.

    python -m bench.planning.latency [--append]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import numpy.typing as npt

from bench.record import add_record
from llep.cost import PRESETS
from llep.generate import zipf_counts
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step, warm_up

SEEDS, REPEATS, WARM_UPS = 20, 200, 20
SIZES = ((8, 128, 16384 * 4), (64, 256, 8192 * 8), (256, 512, 8192 * 8))
EXPERT_BYTES = 44_040_192  # DeepSeek-V3 in FP8


def with_everything(placement: Placement) -> tuple[Placement, PlanOptions]:
    """As many resident replicas as ranks, at random, and every option switched on."""
    rng = np.random.default_rng(0)
    ranks, experts = placement.ep_size, placement.num_experts
    pairs = {(int(rng.integers(experts)), int(rng.integers(ranks))) for _ in range(ranks)}
    replicas = tuple(sorted(pairs - set(enumerate(placement.home_rank))))
    options = PlanOptions(
        bytes_per_expert=EXPERT_BYTES,
        max_lend_bytes=10**12,
        free_bytes=(2 * EXPERT_BYTES,) * ranks,
        ranks_per_node=8,
        cost_model=PRESETS["h200"],
    )
    return Placement(placement.home_rank, placement.free_slots, replicas), options


def timed_us(counts_RE: npt.NDArray[np.int64], placement: Placement, options: PlanOptions) -> list[tuple[float, float]]:
    """(wall, CPU) microseconds of each of REPEATS plans."""
    for _ in range(WARM_UPS):
        plan_step("quota", counts_RE, placement, options)
    times_us = []
    for _ in range(REPEATS):
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        plan_step("quota", counts_RE, placement, options)
        cpu_ns, wall_ns = time.thread_time_ns() - start_cpu_ns, time.perf_counter_ns() - start_ns
        times_us.append((wall_ns / 1e3, cpu_ns / 1e3))
    return times_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true", help="add the results to bench/results/planning.jsonl")
    asked = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warm_up()
    for ranks, experts, pairs in SIZES:
        for ratio in (1.51, 2.01, 3.03):
            batches = [zipf_counts(ranks, experts, pairs, ratio, seed) for seed in range(SEEDS)]
            plain = Placement.linear(experts, ranks, 2)
            for name, (placement, options) in (("plain", (plain, PlanOptions())), ("all", with_everything(plain))):
                times_us = np.array([timed_us(counts_RE, placement, options) for counts_RE in batches])
                wall_us, cpu_us = np.median(np.percentile(times_us, (50, 99), axis=1), axis=1).T.tolist()
                measured = {
                    "case": "latency",
                    "planner": "quota",
                    "ranks": ranks,
                    "experts": experts,
                    "target": ratio,
                    "with": name,
                    "seeds": SEEDS,
                    "p50_us": round(wall_us[0], 1),
                    "p99_us": round(wall_us[1], 1),
                    "cpu_p50_us": round(cpu_us[0], 1),
                    "cpu_p99_us": round(cpu_us[1], 1),
                    "min_us": round(float(times_us.min(axis=(0, 1))[0]), 1),
                }
                add_record("planning", measured, append=asked.append)


if __name__ == "__main__":
    main()
