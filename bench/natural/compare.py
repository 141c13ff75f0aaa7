"""Every planner on the natural traces: imbalance before and after, lends, predicted time. One line a number of ranks.

Counts are replayed on 2 to 16 ranks as 8192 tokens per rank, on experts and links as gpt-oss-20b has on H200s: who is
popular is measured, how much there is to do is not. The table adds what bench.natural.gain measured in vLLM.

    python -m bench.natural.compare [prefill decode] [--append] [--table]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import RESULTS, add_record
from llep.cost import PRESETS
from llep.planning import PlanOptions, warm_up
from llep.shapes import SHAPES, StepCounts
from llep.simulate import Setup, simulate, summary
from llep.traces import Trace

TRACES = Path(__file__).parent / "traces"
RANKS = (2, 4, 8, 16)
TOKENS_PER_RANK = {"prefill": 8192, "decode": 256}
SLOTS, WINDOW_STEPS = 4, 10
PLANNERS = ("home", "least_loaded", "quota", "eplb", "eplb+1", "lplb+1", "replicas+1", "quota+1", "exact")
SIZE = SHAPES["gpt-oss-20b"]


def compare(phase: str, ranks: int) -> dict[str, Any]:
    """planner -> what it did, as means over workloads."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in PLANNERS}
    for folder in sorted(TRACES.glob(f"*-{phase}")):
        trace = Trace(folder)
        shape = replace(
            trace.shape,
            hidden_size=SIZE.hidden_size,
            intermediate_size=SIZE.intermediate_size,
            bytes_per_expert=SIZE.bytes_per_expert,
        )
        options = PlanOptions(
            imbalance_threshold=1.1, min_chunk_tokens=256, cost_model=PRESETS["h200"], phase=_phase(phase)
        )
        setup = Setup(shape=shape, num_ranks=ranks, slots_per_rank=SLOTS, options=options, window_steps=WINDOW_STEPS)
        steps = _scaled(trace.steps(), shape.top_k, TOKENS_PER_RANK[phase] * ranks)
        for planner in summary(simulate(steps, setup, PLANNERS))["planners"]:
            found[planner["planner"]][folder.name.removesuffix(f"-{phase}")] = planner
    home_s = {workload: planner["predicted_s_per_step"] for workload, planner in found["home"].items()}
    return {name: _means(of_workloads, home_s) for name, of_workloads in found.items()}


def _phase(phase: str) -> Any:
    return phase


def _scaled(steps: Iterable[StepCounts], top_k: int, tokens: int) -> Iterator[StepCounts]:
    """The same shares, as many tokens in each step."""
    for step in steps:
        routed = int(step.counts_LRE[0].sum()) // top_k
        yield step._replace(counts_LRE=(step.counts_LRE * tokens + routed // 2) // max(routed, 1))


def _means(of_workloads: dict[str, dict[str, Any]], home_s: dict[str, float]) -> dict[str, Any]:
    def mean(key: str) -> float:
        return statistics.fmean(planner[key] for planner in of_workloads.values())

    gains = [home_s[name] / planner["predicted_s_per_step"] for name, planner in of_workloads.items()]
    return {
        "imbalance_ratio": round(statistics.fmean(p["imbalance_ratio"]["mean"] for p in of_workloads.values()), 3),
        "imbalance_ratio_p95": round(statistics.fmean(p["imbalance_ratio"]["p95"] for p in of_workloads.values()), 3),
        "by_workload": {name: round(p["imbalance_ratio"]["mean"], 3) for name, p in of_workloads.items()},
        "lends_per_layer_step": round(mean("lends_per_layer_step"), 2),
        "moved_copies": round(mean("moved_copies"), 1),
        "predicted_gain": round(statistics.fmean(gains), 3),
        "ideal_time_ratio": round(mean("ideal_time_ratio"), 3),
        "plan_us_p50": round(statistics.median(p["plan_us"]["p50"] for p in of_workloads.values()), 1),
    }


def table(phase: str, by_ranks: dict[int, dict[str, Any]], measured: dict[str, float]) -> str:
    """Markdown: for each planner and number of ranks imbalance before and after, lends per layer and step, and the
    predicted gain of MoE layers; measured: planner -> gain of prefill on two ranks in vLLM.
    """
    before = {ranks: planners["home"]["imbalance_ratio"] for ranks, planners in by_ranks.items()}
    heads = [f"{phase}: planner", *(f"{ranks} ranks, {ratio:.2f} before" for ranks, ratio in before.items())]
    if measured:
        heads.append("prefill measured on 2")
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for name in PLANNERS:
        cells = [f"`{name}`", *(_cell(planners[name]) for planners in by_ranks.values())]
        if measured:
            cells.append(f"{measured[name]:.2f}x" if name in measured else "")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(planner: dict[str, Any]) -> str:
    return f"{planner['imbalance_ratio']:.2f}, {planner['lends_per_layer_step']:.1f}, {planner['predicted_gain']:.2f}x"


def results(phase: str) -> tuple[dict[int, dict[str, Any]], dict[str, float]]:
    """What `table` takes, from the newest lines of bench/results/natural.jsonl."""
    lines = [json.loads(line) for line in (RESULTS / "natural.jsonl").read_text().splitlines()]
    by_ranks = {
        line["ranks"]: line["planners"] for line in lines if line["case"] == "planners" and line["phase"] == phase
    }
    of_planner: dict[str, dict[str, float]] = {"home": {"": 1.0}}
    for line in lines if phase == "prefill" else ():
        if line["case"] == "gain":
            of_planner.setdefault(line.get("planner", "quota"), {})[line["workload"]] = line["prefill_ratio"]
    measured = {planner: statistics.fmean(ratios.values()) for planner, ratios in of_planner.items()}
    return by_ranks, measured if phase == "prefill" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="phase", help="prefill, decode; both without")
    parser.add_argument("--append", action="store_true", help="add the lines to bench/results/natural.jsonl")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the results kept, and do nothing else"
    )
    asked = parser.parse_args()
    if asked.table:
        print("\n\n".join(table(phase, *results(phase)) for phase in asked.phases or TOKENS_PER_RANK))
        return
    warm_up()
    for phase in asked.phases or TOKENS_PER_RANK:
        by_ranks = {ranks: compare(phase, ranks) for ranks in RANKS}
        for ranks, planners in by_ranks.items():
            circumstances = {"case": "planners", "phase": phase, "ranks": ranks, "slots_per_rank": SLOTS}
            sizes = {"tokens_per_rank": TOKENS_PER_RANK[phase], "window_steps": WINDOW_STEPS, "cost_model": "h200"}
            add_record("natural", {**circumstances, **sizes, "planners": planners}, append=asked.append)


if __name__ == "__main__":
    main()
