"""Resident replicas: llep's planner against EPLB on the same windows of loads, judged on the window that follows.

Every round a window is seen, both plan anew, and the next window is split as well as each placement allows. EPLB is
also judged as it is used, with each expert's load split evenly over its copies. Windows are generated, or those of a
trained model in vLLM (bench/natural): a step each. Prints one JSON line a case.

    python -m bench.placement [--only natural] [--append]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.natural.compare import TRACES
from bench.record import add_record
from llep.generate import Workload, generate_steps
from llep.placement import Placement
from llep.planning.eplb import plan_eplb
from llep.planning.peers import copies_of
from llep.planning.replicas import Forecast, Replica, ReplicaLimits, plan_replicas
from llep.planning.split import Split
from llep.shapes import SHAPES, ModelShape
from llep.traces import Trace

ROUNDS, WARM_UP, WINDOWS_PER_ROUND = 10, 8, 4
CASES = [
    (model, ranks, layers, workload)
    for model, ranks, layers in (("gpt-oss-120b", 8, 8), ("deepseek-v3", 64, 8))
    for workload in (
        "balanced",
        "zipf:ratio=1.3",
        "zipf:ratio=2",
        "zipf:ratio=2,drift=0.01",
        "hot_set:share=0.5,experts=4",
    )
]
NATURAL = "natural:"
CASES += [
    ("natural-gpt-oss", ranks, 4, f"{NATURAL}{workload}-{phase}")
    for ranks in (8, 16)
    for workload, phase in (("manuals", "prefill"), ("mixed", "prefill"), ("shifting", "prefill"), ("mixed", "decode"))
]
Loads = npt.NDArray[np.int64]


class Llep:
    """One copy per rank and layer on average, spent as the planner likes."""

    def __init__(self, shape: ModelShape, ranks: int) -> None:
        self._home_LE = np.tile(Placement.linear(shape.num_experts, ranks, 0).home_rank_E, (shape.num_layers, 1))
        self._limits = ReplicaLimits(budget_bytes=(shape.num_layers,) * ranks, bytes_per_expert=1)
        self._forecast = Forecast.start(shape.num_layers, shape.num_experts)
        self._ranks = ranks
        self.replicas: tuple[Replica, ...] = ()

    def see(self, loads_LE: Loads) -> None:
        self._forecast = self._forecast.seen(loads_LE)

    def plan(self) -> int:
        found = plan_replicas(self._forecast, self._home_LE, self.replicas, self._limits)
        self.replicas = found.replicas
        return len(found.added)

    def ratios(self, loads_LE: Loads) -> dict[str, float]:
        splits = [
            _split(loads_E, home_E, [(c.expert, c.rank) for c in self.replicas if c.layer == at], self._ranks)
            for at, (loads_E, home_E) in enumerate(zip(loads_LE, self._home_LE, strict=True))
        ]
        return {"imbalance_ratio": statistics.mean(splits)}


class Eplb:
    """One more slot per rank in every layer."""

    def __init__(self, shape: ModelShape, ranks: int) -> None:
        self._ranks, self._experts = ranks, shape.num_experts
        self._held = np.tile(np.arange(shape.num_experts).reshape(ranks, -1), (shape.num_layers, 1, 1))
        self._slots_LS = self._held.reshape(shape.num_layers, -1)
        self._window = np.zeros((shape.num_layers, shape.num_experts), dtype=np.int64)

    def see(self, loads_LE: Loads) -> None:
        self._window += loads_LE

    def plan(self) -> int:
        self._slots_LS = plan_eplb(self._window, self._experts + self._ranks, self._ranks)
        new = self._slots_LS.reshape(len(self._window), self._ranks, -1)
        moved = sum(
            len(set(now.tolist()) - set(before.tolist()))
            for now_layer, before_layer in zip(new, self._held, strict=True)
            for now, before in zip(now_layer, before_layer, strict=True)
        )
        self._held = new
        self._window[:] = 0
        return moved

    def ratios(self, loads_LE: Loads) -> dict[str, float]:
        best, even = [], []
        for loads_E, slots_S in zip(loads_LE, self._slots_LS, strict=True):
            placement = copies_of(slots_S, self._experts, self._ranks).placement
            best.append(_split(loads_E, placement.home_rank_E, list(placement.replicas), self._ranks))
            copies = np.bincount(slots_S, minlength=self._experts)
            rank_loads = (loads_E / copies)[slots_S].reshape(self._ranks, -1).sum(axis=1)
            even.append(float(rank_loads.max() / rank_loads.mean()))
        return {"imbalance_ratio": statistics.mean(best), "imbalance_ratio_even_split": statistics.mean(even)}


def _split(loads_E: Loads, home_E: Loads, copies: list[tuple[int, int]], ranks: int) -> float:
    split = Split(loads_E.astype(np.float64), home_E, ranks)
    split.add(copies)
    return split.imbalance_ratio


def run(model: str, ranks: int, layers: int, workload: str, append: bool) -> None:
    natural = Trace(TRACES / workload.removeprefix(NATURAL)) if workload.startswith(NATURAL) else None
    shape = natural.shape if natural else replace(SHAPES[model], layer_numbers=tuple(range(layers)))
    for planner in (Llep(shape, ranks), Eplb(shape, ranks)):
        windows = _natural_windows(natural) if natural else _windows(shape, ranks, workload)
        for _ in range(WARM_UP):
            planner.see(next(windows))
        moved, seconds, ratios = [], [], []
        for _ in range(ROUNDS):
            start_s = time.process_time()
            moved.append(planner.plan())
            seconds.append(time.process_time() - start_s)
            following = [next(windows) for _ in range(WINDOWS_PER_ROUND)]
            ratios += [planner.ratios(window) for window in following]
            for window in following:
                planner.see(window)
        measured: dict[str, Any] = {
            "case": workload,
            "model": model,
            "ranks": ranks,
            "layers": layers,
            "seed": 0,
            "planner": type(planner).__name__.lower(),
            "moved_first": moved[0],
            "moved_later_mean": round(statistics.mean(moved[1:]), 2),
            "copies": len(planner.replicas) if isinstance(planner, Llep) else ranks * layers,
            "plan_cpu_s_first": round(seconds[0], 3),
            "plan_cpu_s_later_median": round(statistics.median(seconds[1:]), 3),
        }
        measured |= {name: round(statistics.mean(each[name] for each in ratios), 4) for name in ratios[0]}
        add_record("placement", measured, append=append)


def _windows(shape: ModelShape, ranks: int, workload: str) -> Iterator[Loads]:
    steps = generate_steps(
        Workload.parse(workload),
        shape,
        num_ranks=ranks,
        tokens_per_rank=8192,
        steps=WARM_UP + ROUNDS * WINDOWS_PER_ROUND,
        seed=0,
    )
    return (step.counts_LRE.sum(axis=1) for step in steps)


def _natural_windows(trace: Trace) -> Iterator[Loads]:
    return (step.counts_LRE.sum(axis=1) for step in trace.steps())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="add the lines to bench/results/placement.jsonl")
    parser.add_argument("--only", default="", help="only cases whose workload begins so")
    chosen = parser.parse_args()
    for each in CASES:
        if each[-1].startswith(chosen.only):
            run(*each, chosen.append)
