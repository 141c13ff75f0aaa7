"""How fast the simulator is, and what the planners make of the same loads side by side.

speed: 61 MoE layers x 1,000 steps x 64 ranks under quota on one core, loads generated on the way.
peers: every planner over the same loads; one line a workload and planner.

    python -m bench.simulate [speed peers] [--append]
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace

from bench.record import add_record
from llep.cost import PRESETS
from llep.generate import Workload, generate_steps
from llep.planning import PlanOptions, warm_up
from llep.shapes import SHAPES, StepCounts
from llep.simulate import Setup, simulate, summary

RANKS, TOKENS_PER_RANK, SLOTS = 64, 8192, 2
SPEED_LAYERS, SPEED_STEPS = 61, 1000
PEER_LAYERS, PEER_STEPS, PEER_WINDOW = 4, 60, 20
PEER_PLANNERS = ("home", "least_loaded", "quota", "eplb", "eplb+1", "lplb+1", "replicas+1", "quota+1", "exact")
PEER_WORKLOADS = (
    "balanced",
    "zipf:ratio=1.3",
    "zipf:ratio=2",
    "zipf:ratio=3",
    "zipf:ratio=2,drift=0.02",
    "rotating:ratio=3,period=1",
    "burst:ratio=4,period=20",
    "paper:share=0.8,experts=4",
)


def speed(append: bool) -> None:
    warm_up()  # compiled before the clock starts
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shape = replace(SHAPES["deepseek-v3"], layer_numbers=tuple(range(SPEED_LAYERS)))
    for name in (None, "h200"):
        options = PlanOptions(cost_model=PRESETS[name] if name else None)
        setup = Setup(shape=shape, num_ranks=RANKS, slots_per_rank=SLOTS, options=options)
        workload = Workload(kind="zipf", ratio=2.0)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        done = simulate(_steps(workload, setup, SPEED_STEPS), setup, ["quota"])
        found = summary(done)["planners"][0]
        add_record(
            "simulate",
            {
                "case": "speed",
                "layers": SPEED_LAYERS,
                "steps": SPEED_STEPS,
                "ranks": RANKS,
                "experts": shape.num_experts,
                "planner": "quota",
                "cost_model": name,
                "seed": 0,
                "wall_s": round(time.perf_counter() - wall_s, 2),
                "cpu_s": round(time.process_time() - cpu_s, 2),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "imbalance_ratio_mean": found["imbalance_ratio"]["mean"],
                "lends_per_layer_step": round(found["lends_per_layer_step"], 2),
                "plan_us": found["plan_us"],
            },
            append=append,
        )


def peers(append: bool) -> None:
    warm_up()
    shape = replace(SHAPES["deepseek-v3"], layer_numbers=tuple(range(PEER_LAYERS)))
    options = PlanOptions(cost_model=PRESETS["h200"], ranks_per_node=8)
    setup = Setup(shape=shape, num_ranks=RANKS, slots_per_rank=SLOTS, options=options, window_steps=PEER_WINDOW)
    for text in PEER_WORKLOADS:
        found = summary(simulate(_steps(Workload.parse(text), setup, PEER_STEPS), setup, PEER_PLANNERS))
        for planner in found["planners"]:
            add_record(
                "simulate",
                {
                    "case": "peers",
                    "workload": text,
                    "ranks": RANKS,
                    "ranks_per_node": 8,
                    "experts": shape.num_experts,
                    "tokens_per_rank": TOKENS_PER_RANK,
                    "slots_per_rank": SLOTS,
                    "window_steps": PEER_WINDOW,
                    "steps": PEER_STEPS,
                    "layers": PEER_LAYERS,
                    "cost_model": "h200",
                    "seed": 0,
                    "planner": planner["planner"],
                    "imbalance_ratio": planner["imbalance_ratio"],
                    "lends_per_layer_step": round(planner["lends_per_layer_step"], 2),
                    "moved_copies": planner["moved_copies"],
                    "peak_gib_of_a_rank": round(max(planner["peak_memory_bytes_by_rank"]) / 2**30, 3),
                    "predicted_ms_per_layer": round(planner["predicted_s_per_step"] * 1e3 / PEER_LAYERS, 4),
                    "ideal_time_ratio": round(planner["ideal_time_ratio"], 4),
                    "plan_us": planner["plan_us"],
                },
                append=append,
            )


def _steps(workload: Workload, setup: Setup, steps: int) -> Iterator[StepCounts]:
    return generate_steps(workload, setup.shape, num_ranks=RANKS, tokens_per_rank=TOKENS_PER_RANK, steps=steps, seed=0)


CASES = {"speed": speed, "peers": peers}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which to run; all by default")
    parser.add_argument("--append", action="store_true", help="add the lines to bench/results/simulate.jsonl")
    chosen = parser.parse_args()
    for case in chosen.cases or CASES:
        CASES[case](chosen.append)
