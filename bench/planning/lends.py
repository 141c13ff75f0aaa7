"""How many lends does it take, and which maximum load is reached?

zipf: 64 ranks, 256 experts, 2 slots per rank, 8192 tokens per rank, top-8, popularity tuned to a ratio.
natural: mild skew (lognormal popularity tuned to 1.05 to 1.3), several sizes, balanced from any ratio on.
decode: 32 ranks, 256 experts, 128 tokens per rank, top-8, Zipf 1.2; once as prefill without costs, then with costs.

    python -m bench.planning.lends [zipf natural decode] [--append]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from bench.record import add_record
from llep.cost import PRESETS
from llep.generate import lognormal_counts, zipf_counts
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step, warm_up

Counts = npt.NDArray[np.int64]
SEEDS = 20
PLANNERS = ("quota", "least_loaded")


def zipf(append: bool) -> None:
    for ratio in (1.51, 2.01, 3.03):
        batches = [zipf_counts(64, 256, 8192 * 8, ratio, seed) for seed in range(SEEDS)]
        for planner in PLANNERS:
            _record("zipf", {"target": ratio}, planner, batches, Placement.linear(256, 64, 2), PlanOptions(), append)


def natural(append: bool) -> None:
    options = PlanOptions(imbalance_threshold=1.0)
    for ranks, experts, pairs in ((8, 256, 16384 * 8), (8, 128, 32768 * 4), (32, 256, 8192 * 8), (64, 256, 8192 * 8)):
        for ratio in (1.05, 1.13, 1.2, 1.3):
            batches = [lognormal_counts(ranks, experts, pairs, ratio, seed) for seed in range(SEEDS)]
            for slots in (2, 8):
                for planner in PLANNERS:
                    about = {"target": ratio, "slots_per_rank": slots}
                    placement = Placement.linear(experts, ranks, slots)
                    _record("natural", about, planner, batches, placement, options, append)


def decode(append: bool) -> None:
    weights_E = 1 / np.arange(1, 257) ** 1.2
    batches = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        batches.append(rng.multinomial(128 * 8, rng.permutation(weights_E) / weights_E.sum(), size=32))
    placement = Placement.linear(256, 32, 2)
    for name in (None, *PRESETS):
        for planner in PLANNERS:
            options = PlanOptions(cost_model=PRESETS[name] if name else None)
            _record("decode", {"cost_model": name}, planner, batches, placement, options, append)


def _record(
    case: str,
    about: dict[str, object],
    planner: str,
    batches: Iterable[Counts],
    placement: Placement,
    options: PlanOptions,
    append: bool,
) -> None:
    before, after, lends, gains_s = [], [], [], []
    for counts_RE in batches:
        plan = plan_step(planner, counts_RE, placement, options)
        plain = home_loads(counts_RE.sum(axis=0).tolist(), placement.home_rank, placement.ep_size)
        before.append(imbalance_ratio(plain))
        after.append(imbalance_ratio(plan.rank_loads))
        lends.append(len(plan.lends))
        gains_s.append(plan.predicted_gain_s)
    measured = {
        "case": case,
        "ranks": placement.ep_size,
        "experts": placement.num_experts,
        "slots_per_rank": max(placement.free_slots),
        **about,
        "planner": planner,
        "seeds": len(before),
        "ratio_before": round(float(np.mean(before)), 4),
        "ratio_after_mean": round(float(np.mean(after)), 4),
        "ratio_after_max": round(max(after), 4),
        "lends_mean": round(float(np.mean(lends)), 2),
        "lends_max": max(lends),
    }
    if options.cost_model is not None:
        measured |= {
            "gain_us_mean": round(float(np.mean(gains_s)) * 1e6, 1),
            "gain_us_min": round(min(gains_s) * 1e6, 1),
        }
    add_record("planning", measured, append=append)


CASES: dict[str, Callable[[bool], None]] = {"zipf": zipf, "natural": natural, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"from {', '.join(CASES)}; all without")
    parser.add_argument("--append", action="store_true", help="add the results to bench/results/planning.jsonl")
    asked = parser.parse_args()
    warm_up()
    for case in asked.cases or CASES:
        CASES[case](asked.append)


if __name__ == "__main__":
    main()
