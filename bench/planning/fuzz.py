"""Do the planners ever break a rule? Random cases, each checked against every rule; the first breach ends the run.

Every tenth case is also planned by the readable definition, which must give the same plan.

    python -m bench.planning.fuzz [--cases 100000] [--first-seed 0] [--append]
"""

from __future__ import annotations

import argparse
from collections import Counter

from bench.planning.cases import check, random_case
from bench.record import add_record
from llep.planning import PLANNERS, warm_up

DEFINITIONS = dict(PLANNERS)  # the readable ones: warm_up comes later


def fuzz(planner: str, seeds: range) -> Counter[str]:
    """How often each decision was taken. AssertionError, naming planner and seed, for a plan that breaks a rule."""
    decisions: Counter[str] = Counter()
    for seed in seeds:
        case = random_case(seed)
        try:
            plan = check(planner, case)
            assert seed % 10 or plan == DEFINITIONS[planner](*case), "not the plan that the definition makes"
        except AssertionError as error:
            raise AssertionError(f"{planner}, seed {seed}: {error}") from error
        decisions[plan.decision.value] += 1
    return decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add the results to bench/results/planning.jsonl")
    asked = parser.parse_args()
    warm_up()
    for planner in ("quota", "least_loaded"):
        decisions = fuzz(planner, range(asked.first_seed, asked.first_seed + asked.cases))
        measured = {"case": "fuzz", "planner": planner, "cases": asked.cases, "violations": 0}
        add_record("planning", {**measured, "decisions": dict(decisions.most_common())}, append=asked.append)


if __name__ == "__main__":
    main()
