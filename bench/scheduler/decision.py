"""How long one placement decision takes for a large engine: its first, and one with all replicas in place.

Windows of loads are drawn, the decision is the scheduler's own (decide_placement). One JSON line a case.

    python -m bench.scheduler.decision [--append]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from bench.record import add_record
from llep.config import Settings
from llep.generate import Workload, generate_steps
from llep.placement import Placement
from llep.planning.replicas import Forecast, Replica
from llep.scheduler.decide_placement import Ground, decide_placement
from llep.scheduler.evidence import Evidence
from llep.shapes import SHAPES, ModelShape

WINDOWS = 24
CASES = [
    ("deepseek-v3", 64, workload, copies_per_layer)
    for workload in ("balanced", "zipf:ratio=2", "zipf:ratio=2,drift=0.01", "hot_set:share=0.5,experts=4")
    for copies_per_layer in (0.5, 1.0)
]


def ground_of(shape: ModelShape, ranks: int, forecast: Forecast, present: tuple[Replica, ...], room: int) -> Ground:
    ones_P = np.ones(2)
    evidence = Evidence(
        settings=Settings(replicas="apply"),
        window_s=300.0,
        ep_size=ranks,
        num_layers=shape.num_layers,
        top_k=shape.top_k,
        bytes_per_expert=shape.bytes_per_expert,
        is_one_node=False,
        cost_model=None,
        tokens_P=1e6 * ones_P,
        layer_steps_P=1e4 * ones_P,
        before_P=2.0 * ones_P,
        after_P=1.1 * ones_P,
        layer_seconds_P=100.0 * ones_P,
        phase_seconds={"lend": 10.0, "compute": 150.0},
        lends=1e5,
        lend_bytes=1e5 * shape.bytes_per_expert,
        decisions={"lend": 1e4},
        predicted_gain_s=0.0,
        worth_NPW=np.zeros((0, 2, 6)),
    )
    return Ground(
        forecast=forecast,
        home_rank_LE=np.tile(Placement.linear(shape.num_experts, ranks, 0).home_rank_E, (shape.num_layers, 1)),
        present=present,
        room_R=(room,) * ranks,
        bytes_per_expert=shape.bytes_per_expert,
        bytes_per_s=64 << 20,
        lends_L=np.full(shape.num_layers, 1e3),
        evidence=evidence,
    )


def measure(model: str, ranks: int, workload: str, copies_per_layer: float, repeats: int) -> dict[str, Any]:
    shape = SHAPES[model]
    forecast = Forecast.start(shape.num_layers, shape.num_experts)
    for step in generate_steps(
        Workload.parse(workload), shape, num_ranks=ranks, tokens_per_rank=4096, steps=WINDOWS, seed=0
    ):
        forecast = forecast.seen(step.counts_LRE.sum(axis=1))
    room, present = int(copies_per_layer * shape.num_layers), ()
    seconds: dict[str, list[float]] = {"first": [], "later": []}
    outcomes, copies = {}, 0
    for name in seconds:
        for _ in range(repeats):
            # A new forecast each time: what it has worked out once is kept.
            again = Forecast(forecast.share_WLE, forecast.pairs_WL, forecast.smoothing)
            start_s = time.process_time()
            decision, found = decide_placement(ground_of(shape, ranks, again, present, room), is_filling=False)
            seconds[name].append(time.process_time() - start_s)
        assert found is not None
        outcomes[name] = decision.outcome
        present, copies = found.plan.replicas, len(found.plan.replicas)
    return {
        "bench": "decision",
        "model": model,
        "layers": shape.num_layers,
        "experts": shape.num_experts,
        "ranks": ranks,
        "workload": workload,
        "room_per_rank": room,
        "copies": copies,
        "cpu_s_first": round(statistics.median(seconds["first"]), 3),
        "cpu_s_later": round(statistics.median(seconds["later"]), 3),
        "outcomes": outcomes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    for case in CASES:
        add_record("scheduler", measure(*case, arguments.repeats), append=arguments.append)


if __name__ == "__main__":
    main()
