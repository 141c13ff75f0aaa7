"""How far is quota from the true optimum? Small cases, the optimum by MILP under the same slots, chunks of any size.

python -m bench.planning.optimum [--cases 300] [--append]
"""

from __future__ import annotations

import argparse

import numpy as np

from bench.planning.cases import Case
from bench.record import add_record
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step, warm_up
from llep.planning.peers import plan_optimum


def small_case(seed: int) -> Case:
    """2 to 8 ranks with 1 to 4 experts each, 0 to 3 slots, four kinds of skew."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 9))
    experts = ranks * int(rng.integers(1, 5))
    kind = seed % 4
    if kind == 0:
        weights_E = rng.lognormal(0, rng.uniform(0.3, 2), experts)
    elif kind == 1:
        weights_E = rng.permutation(1 / np.arange(1, experts + 1) ** rng.uniform(0.3, 1.6))
    elif kind == 2:
        weights_E = np.ones(experts)
        weights_E[rng.choice(experts, min(experts, int(rng.choice([1, 2, 4]))), replace=False)] = rng.uniform(3, 40)
    else:
        weights_E = np.sort(rng.lognormal(0, 1, experts))[::-1]
    counts_RE = rng.multinomial(int(rng.integers(500, 20000)), weights_E / weights_E.sum(), size=ranks)
    slots_R = rng.integers(0, 4, ranks) if seed % 3 else np.full(ranks, rng.integers(1, 4))
    placement = Placement.linear(experts, ranks, tuple(np.minimum(slots_R, experts).tolist()))
    return Case(counts_RE, placement, PlanOptions(imbalance_threshold=1.0, min_chunk_tokens=1))


def excess_over_optimum(case: Case, time_limit_s: float = 1.0) -> float:
    """Maximum load of quota's plan over the optimum's, or over what HiGHS and the mean load bound it in that time."""
    plan = plan_step("quota", *case)
    tokens_E = case.counts_RE.sum(axis=0)
    optimum = plan_optimum(tokens_E, case.placement, case.options, time_limit_s)
    bound = max(max(optimum.plan.rank_loads) * (1.0 - optimum.gap), tokens_E.sum() / case.placement.ep_size)
    return max(plan.rank_loads) / float(bound) - 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--append", action="store_true", help="add the results to bench/results/planning.jsonl")
    asked = parser.parse_args()
    warm_up()
    excess = np.array([excess_over_optimum(small_case(seed)) for seed in range(asked.cases)])
    measured = {
        "case": "optimum",
        "planner": "quota",
        "seeds": asked.cases,
        "excess_mean": round(float(excess.mean()), 5),
        "excess_p99": round(float(np.percentile(excess, 99)), 5),
        "excess_max": round(float(excess.max()), 5),
        "within_2_percent": round(float((excess <= 0.02).mean()), 4),
    }
    add_record("planning", measured, append=asked.append)


if __name__ == "__main__":
    main()
