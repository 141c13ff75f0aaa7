"""Cases for step planners, drawn at random from everything they accept, and what must hold for every plan."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llep.cost import CostModel, Link, predict_s
from llep.placement import Placement
from llep.plan import Decision, Plan, check_plan, node_of
from llep.planning import PlanOptions, plan_step

Counts = npt.NDArray[np.int64]

# Costs at which plans of small batches are worth it sometimes (slow links), or most of the time (fast ones).
SLOW_LINKS = CostModel(
    name="slow-links",
    source="made up for tests",
    expert_bytes=10,
    gemm_curve=((1, 1e-6), (8, 2e-6), (64, 1e-5)),
    gemm_launch_s=1e-6,
    node_link=Link(1e-6, 1e7),
    network_link=Link(3e-6, 1e6),
    plan_s=2e-6,
    overlap_ratio=0.5,
)
FAST_LINKS = CostModel(
    name="fast-links",
    source="made up for tests",
    expert_bytes=10,
    gemm_curve=((1, 1e-6), (8, 2e-6), (64, 1e-5)),
    gemm_launch_s=1e-7,
    node_link=Link(1e-8, 1e9),
    network_link=Link(3e-8, 1e8),
    plan_s=0.0,
    margin_ratio=0.0,
)


class Case(NamedTuple):
    counts_RE: Counts
    placement: Placement
    options: PlanOptions


def random_case(seed: int) -> Case:
    """Up to 16 ranks and 32 experts: hot experts, any homes, replicas, unequal slots and bytes, nodes, empty ranks."""
    rng = np.random.default_rng(seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    ep_size, num_experts = int(rng.integers(1, 17)), int(rng.integers(1, 33))
    heat_E = rng.exponential(1, num_experts) ** one_of(0, 1, 2, 3)
    counts_RE = rng.poisson(one_of(0, 1, 10, 300, 3000) * heat_E, (ep_size, num_experts)).astype(np.int64)
    counts_RE[rng.random(ep_size) < one_of(0, 0, 0.4)] = 0
    home_E = rng.integers(0, ep_size, num_experts)
    home_E = np.sort(home_E) if rng.random() < 0.5 else home_E
    is_replica_ER = rng.random((num_experts, ep_size)) < one_of(0, 0, 0.05, 0.4)
    is_replica_ER[np.arange(num_experts), home_E] = False
    slots_R = np.minimum(rng.integers(0, rng.integers(1, 6), ep_size), num_experts)
    placement = Placement(
        tuple(home_E.tolist()), tuple(slots_R.tolist()), tuple((int(e), int(r)) for e, r in np.argwhere(is_replica_ER))
    )
    has_bytes = rng.random() < 0.4
    options = PlanOptions(
        imbalance_threshold=one_of(1.0, 1.0, 1.1, 1.3),
        capacity_factor=one_of(1.0, 1.0, 1.1, 2.0),
        min_chunk_tokens=one_of(1, 5, 100, 1000),
        bytes_per_expert=10 if has_bytes else 0,
        max_lend_bytes=one_of(0, 15, 60) if has_bytes else 0,
        free_bytes=tuple(rng.integers(0, 50, ep_size).tolist()) if has_bytes else None,
        ranks_per_node=one_of(None, 1, 2, 4, 8),
        lend_scope=one_of("any", "any", "node"),
        phase=one_of("prefill", "prefill", "decode"),
        cost_model=one_of(None, None, SLOW_LINKS, FAST_LINKS),
    )
    return Case(counts_RE, placement, options)


def check(planner: str, case: Case) -> Plan:
    """The plan, after AssertionError for whatever it breaks."""
    counts_RE, placement, options = case
    plan = plan_step(planner, counts_RE, placement, options)
    home = plan_step("home", counts_RE, placement, options)
    is_home = np.array_equal(home.segments_S4, plan.segments_S4)
    check_plan(plan, counts_RE.sum(axis=0).tolist())
    assert (plan.decision is Decision.LEND) == bool(plan.lends), "the decision does not say whether something is lent"
    assert (plan.decision in (Decision.LEND, Decision.REPLICA)) == (not is_home), "the decision contradicts the plan"
    check_limits(plan, options)
    check_transfers(plan)
    check_gain(plan, home, is_home, options)
    assert plan == plan_step(planner, counts_RE.copy(), placement, options), "not the same plan again"
    return plan


def check_limits(plan: Plan, options: PlanOptions) -> None:
    """Bytes of each rank and of the layer, scope, one lend per (expert, rank), none to a rank that has the weights."""
    pairs = [(lend.expert, lend.dst_rank) for lend in plan.lends]
    assert len(pairs) == len(set(pairs)), "lent twice"
    assert all(lend.dst_rank not in plan.placement.holders[lend.expert] for lend in plan.lends), "lent to a holder"
    assert all(lend.src_rank in plan.placement.holders[lend.expert] for lend in plan.lends), "lent by no holder"
    for rank, free in enumerate(options.free_bytes or ()):
        assert options.bytes_per_expert * sum(lend.dst_rank == rank for lend in plan.lends) <= free, "bytes of a rank"
    most = options.max_lend_bytes or math.inf
    assert len(plan.lends) * options.bytes_per_expert <= most, "bytes of the layer"
    if options.lend_scope == "node":
        assert not any(_crosses(plan, lend.src_rank, lend.dst_rank) for lend in plan.lends), "lent out of scope"


def check_transfers(plan: Plan) -> None:
    """Each lend arrives once, from a rank that had the weights in an earlier round; a node is entered at most once."""
    has_weights = {(expert, rank) for expert, ranks in enumerate(plan.placement.holders) for rank in ranks}
    for round_ in sorted({hop.round for hop in plan.transfers}):
        hops = [hop for hop in plan.transfers if hop.round == round_]
        assert all((hop.expert, hop.src_rank) in has_weights for hop in hops), "sent before it was there"
        has_weights |= {(hop.expert, hop.dst_rank) for hop in hops}
    arrived = sorted((hop.expert, hop.dst_rank) for hop in plan.transfers)
    assert arrived == [(lend.expert, lend.dst_rank) for lend in plan.lends], "transfers are not the lends"
    entered = [
        (hop.expert, node_of(hop.dst_rank, plan.ranks_per_node))
        for hop in plan.transfers
        if _crosses(plan, hop.src_rank, hop.dst_rank)
    ]
    assert len(entered) == len(set(entered)), "a node is entered twice"


def check_gain(plan: Plan, home: Plan, is_home: bool, options: PlanOptions) -> None:
    """Never a predicted loss, and the gain that the plan carries is what the cost model says of it from outside."""
    if options.cost_model is None or is_home:
        assert plan.predicted_gain_s == 0.0
        return
    home_s, plan_s = (predict_s(each, options.cost_model, options.bytes_per_expert) for each in (home, plan))
    least_gain_s = options.cost_model.margin_ratio * home_s * (1 - 1e-9)
    assert plan_s < home_s and home_s - plan_s >= least_gain_s, "a predicted loss, or too small a gain"
    assert math.isclose(plan.predicted_gain_s, home_s - plan_s, rel_tol=1e-9, abs_tol=1e-15), "another gain"


def _crosses(plan: Plan, one_rank: int, other_rank: int) -> bool:
    return node_of(one_rank, plan.ranks_per_node) != node_of(other_rank, plan.ranks_per_node)
