"""Step planners: properties that hold for any load, and plans worked by hand."""

from __future__ import annotations

import pickle

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llep.cost import CostModel, Link, predict_s
from llep.errors import SettingsError
from llep.loads import imbalance_ratio
from llep.placement import Placement
from llep.plan import Decision, Lend, Plan, Segment, Transfer, check_plan, node_of
from llep.planning import PlanOptions, plan_step

Counts = npt.NDArray[np.int64]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Counts, Placement, PlanOptions]:
    """Counts with hot experts, any homes, unequal slots and bytes, small chunks; also empty batches and one rank."""
    ep_size = draw(st.integers(1, 8))
    num_experts = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = rng.exponential(1, num_experts) ** draw(st.sampled_from([0, 1, 3]))
    counts = rng.poisson(draw(st.sampled_from([0, 1, 10, 300])) * scale, (ep_size, num_experts)).astype(np.int64)
    counts[rng.random(ep_size) < draw(st.sampled_from([0.0, 0.4]))] = 0
    homes = rng.integers(0, ep_size, num_experts)
    pairs = [(e, r) for e in range(num_experts) for r in range(ep_size) if r != homes[e]]
    share = draw(st.sampled_from([0.0, 0.0, 0.05, 0.4]))
    placement = Placement(
        tuple(int(r) for r in homes),
        tuple(min(int(s), num_experts) for s in rng.integers(0, draw(st.integers(1, 5)), ep_size)),
        tuple(pair for pair in pairs if rng.random() < share),
    )
    has_bytes = draw(st.booleans())
    options = PlanOptions(
        imbalance_threshold=draw(st.sampled_from([1.0, 1.1, 1.3])),
        capacity_factor=draw(st.sampled_from([1.0, 1.1, 2.0])),
        min_chunk_tokens=draw(st.sampled_from([1, 5, 100])),
        bytes_per_expert=10 if has_bytes else 0,
        max_lend_bytes=draw(st.sampled_from([0, 15, 60])) if has_bytes else 0,
        free_bytes=tuple(int(b) for b in rng.integers(0, 50, ep_size)) if has_bytes else None,
        ranks_per_node=draw(st.sampled_from([None, 1, 2, 4])),
        lend_scope=draw(st.sampled_from(["any", "node"])),
        phase=draw(st.sampled_from(["prefill", "prefill", "decode"])),
        cost_model=draw(st.sampled_from([None, SMALL])),
    )
    return counts, placement, options


# Costs at which plans of small batches are sometimes worth it and sometimes not.
SMALL = CostModel(
    name="small",
    source="made up",
    expert_bytes=10,
    gemm_curve=((1, 1e-6), (8, 2e-6), (64, 1e-5)),
    gemm_launch_s=1e-6,
    node_link=Link(1e-6, 1e7),
    network_link=Link(3e-6, 1e6),
    plan_s=2e-6,
    overlap_ratio=0.5,
)


def check_limits(plan: Plan, options: PlanOptions) -> None:
    """Bytes per rank and per layer, scope, one lend per (expert, rank), none to a rank that has the weights, gain."""
    pairs = [(lend.expert, lend.dst_rank) for lend in plan.lends]
    assert len(pairs) == len(set(pairs))
    assert all(lend.dst_rank not in plan.placement.holders[lend.expert] for lend in plan.lends)
    assert all(lend.src_rank in plan.placement.holders[lend.expert] for lend in plan.lends)
    if options.free_bytes is not None:
        for rank, free in enumerate(options.free_bytes):
            assert options.bytes_per_expert * sum(lend.dst_rank == rank for lend in plan.lends) <= free
    if options.max_lend_bytes:
        assert len(plan.lends) * options.bytes_per_expert <= options.max_lend_bytes
    if options.lend_scope == "node":
        per_node = options.ranks_per_node
        assert all(node_of(lend.src_rank, per_node) == node_of(lend.dst_rank, per_node) for lend in plan.lends)


def check_gain(plan: Plan, counts: Counts, options: PlanOptions) -> None:
    """Never a predicted loss, and the gain that the plan carries is the one that the cost model predicts."""
    if options.cost_model is not None:
        home = plan_step("home", counts, plan.placement, options)
        home_s, plan_s = (predict_s(each, options.cost_model, options.bytes_per_expert) for each in (home, plan))
        is_home = np.array_equal(home.segments_S4, plan.segments_S4)
        assert is_home or plan_s < home_s
        assert plan.predicted_gain_s == (0.0 if is_home else pytest.approx(home_s - plan_s, rel=1e-9, abs=1e-15))


def check_transfers(plan: Plan) -> None:
    """Each lend arrives exactly once, from a rank that had the weights in an earlier round; nodes are entered once."""
    has_weights = {(e, rank) for e, ranks in enumerate(plan.placement.holders) for rank in ranks}
    for round_ in sorted({hop.round for hop in plan.transfers}):
        hops = [hop for hop in plan.transfers if hop.round == round_]
        assert all((hop.expert, hop.src_rank) in has_weights for hop in hops)
        for hop in hops:
            assert (hop.expert, hop.dst_rank) not in has_weights
            has_weights.add((hop.expert, hop.dst_rank))
    assert sorted((hop.expert, hop.dst_rank) for hop in plan.transfers) == [(x.expert, x.dst_rank) for x in plan.lends]
    nodes = [(hop.expert, node_of(hop.dst_rank, plan.ranks_per_node)) for hop in plan.transfers if crosses(plan, hop)]
    assert len(nodes) == len(set(nodes))


def crosses(plan: Plan, hop: Transfer) -> bool:
    return node_of(hop.src_rank, plan.ranks_per_node) != node_of(hop.dst_rank, plan.ranks_per_node)


@pytest.mark.parametrize("planner", ["home", "least_loaded", "quota"])
@given(case=cases())
@settings(max_examples=400, deadline=None)
def test_plans_are_whole_within_limits_and_equal_on_every_rank(
    planner: str, case: tuple[Counts, Placement, PlanOptions]
) -> None:
    counts, placement, options = case
    plan = plan_step(planner, counts, placement, options)
    check_plan(plan, counts.sum(axis=0).tolist())
    check_limits(plan, options)
    check_transfers(plan)
    check_gain(plan, counts, options)
    home = plan_step("home", counts, placement, options)
    is_home = np.array_equal(home.segments_S4, plan.segments_S4)
    assert (plan.decision is Decision.LEND) == bool(plan.lends)
    assert (plan.decision in (Decision.LEND, Decision.REPLICA)) == (not is_home)
    assert plan == plan_step(planner, counts.copy(), placement, options)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_least_loaded_by_hand() -> None:
    """Loads 100, 20, 0, 0 of capacity 30: home keeps 30, rank 2 and 3 are the emptiest, rank 1 has room for 10."""
    counts = np.array([[100, 20, 0, 0], [0] * 4, [0] * 4, [0] * 4])
    plan = plan_step("least_loaded", counts, Placement.linear(4, 4, 1), PlanOptions(min_chunk_tokens=1))
    assert plan.decision is Decision.LEND
    assert plan.segments == (
        Segment(0, 0, 0, 30),
        Segment(0, 2, 30, 60),
        Segment(0, 3, 60, 90),
        Segment(0, 1, 90, 100),
        Segment(1, 1, 0, 20),
    )
    assert plan.lends == (Lend(0, 0, 1, 10), Lend(0, 0, 2, 30), Lend(0, 0, 3, 30))
    assert plan.rank_loads == [30, 30, 30, 30]


def test_least_loaded_keeps_a_remainder_below_the_chunk_at_home() -> None:
    counts = np.array([[100, 20, 0, 0], [0] * 4, [0] * 4, [0] * 4])
    plan = plan_step("least_loaded", counts, Placement.linear(4, 4, 1), PlanOptions(min_chunk_tokens=11))
    assert plan.rank_loads == [40, 20, 30, 30]


def test_least_loaded_overfills_the_least_loaded_rank_when_no_room_is_worth_a_chunk() -> None:
    """Capacity 40. Rank 0 has 60 over its own, ranks 1 and 2 room for 10 each: below m = 20, so rank 1 takes it all."""
    counts = np.array([[60, 30, 30], [0] * 3, [0] * 3])
    plan = plan_step("least_loaded", counts, Placement.linear(3, 3, 1), PlanOptions(min_chunk_tokens=20))
    assert plan.rank_loads == [40, 50, 30]


@pytest.mark.parametrize(
    ("slots", "free_bytes", "threshold", "decision"),
    [
        (0, None, 1.3, Decision.NO_SLOT),
        (1, (9, 9), 1.3, Decision.MEMORY),
        (1, None, 2.1, Decision.BALANCED),
        (1, (10, 10), 1.3, Decision.LEND),
    ],
)
def test_least_loaded_says_why(
    slots: int, free_bytes: tuple[int, ...] | None, threshold: float, decision: Decision
) -> None:
    options = PlanOptions(imbalance_threshold=threshold, min_chunk_tokens=1, bytes_per_expert=10, free_bytes=free_bytes)
    plan = plan_step("least_loaded", np.array([[8, 0], [8, 0]]), Placement.linear(2, 2, slots), options)
    assert plan.decision is decision


def test_no_gain_when_the_only_expert_is_too_small_to_split() -> None:
    plan = plan_step("least_loaded", np.array([[8, 0], [8, 0]]), Placement.linear(2, 2, 1), PlanOptions())
    assert plan.decision is Decision.NO_GAIN


@pytest.mark.parametrize("planner", ["home", "least_loaded", "quota"])
def test_an_empty_batch_is_an_empty_plan(planner: str) -> None:
    plan = plan_step(planner, np.zeros((4, 8), dtype=np.int64), Placement.linear(8, 4, 2), PlanOptions())
    assert plan.segments == () and plan.rank_loads == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros((2, 3), np.int64), r"shape \(ranks, experts\) = \(2, 4\)"),
        (np.array([[0, 0, 0, 0], [0, 0, -3, 0]]), r"in 0\.\.2147483647, got -3 from rank 1 to expert 2"),
        (np.full((2, 4), 2**31), r"in 0\.\.2147483647, got 2147483648 from rank 0 to expert 0"),
        (np.full((2, 4), np.nan), "integers, got dtype float64"),
        (np.zeros((2, 4)), "integers"),
    ],
)
def test_bad_counts_are_named(counts: Counts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_step("least_loaded", counts, Placement.linear(4, 2, 1), PlanOptions())


def test_an_unknown_planner_is_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'quotta' is unknown; choose one of quota, least_loaded, home"):
        plan_step("quotta", np.zeros((2, 4), np.int64), Placement.linear(4, 2, 1), PlanOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imbalance_threshold": float("nan")}, "imbalance_threshold must be a number >= 1, got nan"),
        ({"capacity_factor": 0.5}, "capacity_factor must be a number >= 1, got 0.5"),
        ({"min_chunk_tokens": 0}, "min_chunk_tokens must be an integer >= 1, got 0"),
        ({"bytes_per_expert": -1}, "bytes_per_expert must be an integer >= 0, got -1"),
        ({"free_bytes": (1, 2)}, "give bytes_per_expert"),
        ({"free_bytes": (1, -2), "bytes_per_expert": 1}, r"free_bytes\[1\] must be an integer >= 0, got -2"),
        ({"ranks_per_node": 0}, "ranks_per_node must be an integer >= 1, got 0"),
        ({"lend_scope": "rack"}, "lend_scope must be one of any, node, got 'rack'"),
        ({"phase": "both"}, "phase must be one of prefill, decode, got 'both'"),
    ],
)
def test_bad_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**changes)  # type: ignore[arg-type]


def test_free_bytes_must_match_the_ranks() -> None:
    options = PlanOptions(bytes_per_expert=1, free_bytes=(1, 2, 3))
    with pytest.raises(ValueError, match=r"one entry per rank \(2\), got 3"):
        plan_step("least_loaded", np.zeros((2, 4), np.int64), Placement.linear(4, 2, 1), options)


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 rank"):
        Placement((), ())


def test_moving_load_lowers_the_imbalance_ratio() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(16384, np.r_[[0.4], np.full(63, 0.6 / 63)], size=8)
    plan = plan_step("least_loaded", counts, Placement.linear(64, 8, 8), PlanOptions())
    assert imbalance_ratio(plan.rank_loads) <= 1.01
