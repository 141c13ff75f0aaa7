"""One question to a planner as plain JSON values, and its answer: for scripts, tests and the control plane.

The keys are those of `llep plan simulate`; docs/simulate.md explains them.
"""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.cost import cost_model
from llep.errors import SettingsError
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.planning import PLANNERS, PlanOptions, plan_step
from llep.planning.options import refuse_counts

TIMED_PLANS = 20
DEFAULT_SLOTS = 4
KEYS = {
    "tokens": "pairs of each rank for each expert: [[per rank, per expert]]",
    "home_rank": "home rank of each expert; contiguous blocks if left out",
    "slots_per_rank": f"experts each rank can borrow, one number or one per rank; {DEFAULT_SLOTS} if left out",
    "bytes_per_expert": "weights of one expert in one layer",
    "free_bytes": "bytes of lent weights that each rank has room for",
    "ranks_per_node": "ranks 0..n-1 are node 0 and so on; one node if left out",
    "min_chunk_tokens": "fewest pairs worth lending an expert for",
    "capacity_factor": "rank capacity / mean rank load",
    "imbalance_threshold": "max / mean of rank loads from which a layer is balanced",
    "cost_model": "a preset or a file; null: plans are taken without asking whether they pay",
}
_OPTIONS = {field.name for field in fields(PlanOptions)}


@dataclass(frozen=True, slots=True)
class Question:
    """Counts [ranks, experts] and the limits of the plan."""

    counts_RE: npt.NDArray[np.int64]
    placement: Placement
    options: PlanOptions


def parse_question(values: Any) -> Question:
    """A question from parsed JSON; null is as good as left out. SettingsError names the key, the value and the rule."""
    if not isinstance(values, dict):
        raise SettingsError(f"a question is a JSON object with the keys {', '.join(KEYS)}, got {_short(values)}")
    for key in values:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.0)[0]
            raise SettingsError(f"unknown key {key!r}; did you mean {nearest!r}?", param=str(key))
    given = {key: value for key, value in values.items() if value is not None}
    counts_RE = _counts(given.get("tokens"))
    try:
        return Question(counts_RE, _placement(given, *counts_RE.shape), _options(given, len(counts_RE)))
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None


def check_planner(planner: str) -> None:
    """Raise SettingsError unless a planner has this name."""
    if planner not in PLANNERS:
        raise SettingsError(f"planner={planner!r} is unknown; choose one of {', '.join(PLANNERS)}", param="planner")


def answer(question: Question, planner: str) -> dict[str, Any]:
    """What the planner does: the JSON form that `llep plan simulate` prints. SettingsError for an unknown planner.

    plan_us is the median of 20 plans after one to warm up. Without a cost model the predicted gain is 0, without
    bytes_per_expert the lends have 0 bytes.
    """
    check_planner(planner)
    counts_RE, placement, options = question.counts_RE, question.placement, question.options
    plan = plan_step(planner, counts_RE, placement, options)
    seconds = []
    for _ in range(TIMED_PLANS):
        start_s = time.perf_counter()
        plan_step(planner, counts_RE, placement, options)
        seconds.append(time.perf_counter() - start_s)
    plain = home_loads(counts_RE.sum(axis=0), placement.home_rank, placement.ep_size)
    return {
        "planner": planner,
        "decision": plan.decision.value,
        "before": _loads(plain),
        "after": _loads(plan.rank_loads),
        "segments": [segment._asdict() for segment in plan.segments],
        "lends": [lend._asdict() for lend in plan.lends],
        "lend_bytes": len(plan.lends) * bytes_per_lend(options),
        "plan_us": round(statistics.median(seconds) * 1e6, 3),
        "predicted_gain_us": round(plan.predicted_gain_s * 1e6, 3),
    }


def bytes_per_lend(options: PlanOptions) -> int:
    """Bytes of one lend: as told, else as the cost model's expert has them, else 0."""
    if options.bytes_per_expert or options.cost_model is None:
        return options.bytes_per_expert
    return options.cost_model.expert_bytes


def _loads(rank_loads: list[int]) -> dict[str, Any]:
    return {"imbalance_ratio": imbalance_ratio(rank_loads), "rank_loads": rank_loads}


def _counts(tokens: Any) -> npt.NDArray[np.int64]:
    if tokens is None:
        raise SettingsError(f"tokens is missing: give {KEYS['tokens']}", param="tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(row, list) for row in tokens):
        raise SettingsError(
            f"tokens must be a list with one list per rank, at least 1, got {_short(tokens)}", param="tokens"
        )
    for rank, row in enumerate(tokens):
        if len(row) != len(tokens[0]) or not row:
            raise SettingsError(
                f"tokens must have the same number of experts for each rank, at least 1: "
                f"rank 0 has {len(tokens[0])}, rank {rank} has {len(row)}",
                param="tokens",
            )
        for expert, count in enumerate(row):
            _check_count(f"tokens[{rank}][{expert}]", count)
    counts_RE = np.array(tokens, dtype=np.int64)
    if not counts_RE.any():
        raise SettingsError("tokens holds 0 tokens: there must be at least 1 to plan for", param="tokens")
    try:
        refuse_counts(counts_RE)
    except ValueError as error:
        raise SettingsError(f"tokens: {error}", param="tokens") from None
    return counts_RE


def _placement(given: Mapping[str, Any], num_ranks: int, num_experts: int) -> Placement:
    slots = _slots(given.get("slots_per_rank", min(DEFAULT_SLOTS, num_experts)), num_ranks)
    if max(slots) > num_experts:
        raise SettingsError(
            f"slots_per_rank must be at most the number of experts, {num_experts}, got {max(slots)}",
            param="slots_per_rank",
        )
    home_rank = given.get("home_rank")
    if home_rank is None:
        return Placement.linear(num_experts, num_ranks, slots)
    if not isinstance(home_rank, list):
        raise SettingsError(f"home_rank must be a list of ranks, one per expert, got {_short(home_rank)}")
    if len(home_rank) < num_experts:
        raise SettingsError(
            f"home_rank has {len(home_rank)} entries, tokens has {num_experts} experts: "
            f"expert {len(home_rank)} is without a home",
            param="home_rank",
        )
    if len(home_rank) > num_experts:
        raise SettingsError(f"home_rank has {len(home_rank)} entries, tokens has {num_experts} experts")
    for expert, rank in enumerate(home_rank):
        if rank is None:
            raise SettingsError(f"home_rank: expert {expert} is without a home; give a rank in 0..{num_ranks - 1}")
        _check_count(f"home_rank[{expert}]", rank)
    return Placement(tuple(home_rank), slots)


def _slots(slots: Any, num_ranks: int) -> tuple[int, ...]:
    of_rank = slots if isinstance(slots, list) else [slots] * num_ranks
    if len(of_rank) != num_ranks:
        raise SettingsError(
            f"slots_per_rank must be one number, or one for each of {num_ranks} ranks: got {len(of_rank)}"
        )
    for rank, count in enumerate(of_rank):
        _check_count(f"slots_per_rank[{rank}]" if isinstance(slots, list) else "slots_per_rank", count)
    return tuple(of_rank)


def _options(given: Mapping[str, Any], num_ranks: int) -> PlanOptions:
    values = {key: value for key, value in given.items() if key in _OPTIONS and key != "cost_model"}
    for name in ("capacity_factor", "imbalance_threshold"):
        value = values.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingsError(f"{name} must be a number, got {_short(value)}", param=name)
    if "free_bytes" in values:
        free = values["free_bytes"]
        if not isinstance(free, list) or len(free) != num_ranks:
            raise SettingsError(
                f"free_bytes must be a list with one entry for each of {num_ranks} ranks, got {_short(free)}"
            )
        for rank, count in enumerate(free):
            _check_count(f"free_bytes[{rank}]", count)
        values["free_bytes"] = tuple(free)
    model = given.get("cost_model")
    if model is not None and not isinstance(model, str):
        raise SettingsError(f"cost_model must be a name or null, got {_short(model)}", param="cost_model")
    return PlanOptions(**values, cost_model=None if model is None else cost_model(model))


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise SettingsError(f"{name} must be an integer >= 0, got {_short(value)}", param=name.partition("[")[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
