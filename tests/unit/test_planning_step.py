"""Step planners: rules that hold for any load, and plans worked by hand."""

from __future__ import annotations

import pickle

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.planning.cases import check, random_case
from llep.cost import PRESETS
from llep.errors import SettingsError
from llep.loads import imbalance_ratio
from llep.placement import Placement
from llep.plan import Decision, Lend, Segment, Transfer, relay
from llep.planning import PlanOptions, plan_step
from llep.planning.quota import Way, pick

Counts = npt.NDArray[np.int64]
ONE_BY_ONE = PlanOptions(min_chunk_tokens=1)


@pytest.mark.parametrize("planner", ["home", "least_loaded", "quota"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_plans_break_no_rule_and_are_equal_on_every_rank(planner: str, seed: int) -> None:
    plan = check(planner, random_case(seed))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_least_loaded_by_hand() -> None:
    """Loads 100, 20, 0, 0 of capacity 30: home keeps 30, rank 2 and 3 are the emptiest, rank 1 has room for 10."""
    counts = np.array([[100, 20, 0, 0], [0] * 4, [0] * 4, [0] * 4])
    plan = plan_step("least_loaded", counts, Placement.linear(4, 4, 1), ONE_BY_ONE)
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
    """Capacity 40. Rank 0 has 20 over its own, ranks 1 and 2 room for 10 each: below m = 20, so rank 1 takes it all."""
    counts = np.array([[60, 30, 30], [0] * 3, [0] * 3])
    plan = plan_step("least_loaded", counts, Placement.linear(3, 3, 1), PlanOptions(min_chunk_tokens=20))
    assert plan.rank_loads == [40, 50, 30]


def test_quota_by_hand() -> None:
    """Mean and target 30. Rank 0 gives 70: rooms 26, 24, 20 are filled from the largest. Each rank computes its own
    tokens of the expert first: sources' tokens are 0-40, 40-70, 70-90, 90-100, and the rest goes to the lowest rank."""
    counts = np.array([[40, 10, 0, 0], [30, 0, 0, 0], [20, 0, 4, 0], [10, 0, 0, 6]])
    plan = plan_step("quota", counts, Placement.linear(4, 4, 2), ONE_BY_ONE)
    assert plan.decision is Decision.LEND
    assert plan.segments == (
        Segment(0, 0, 0, 30),
        Segment(0, 2, 30, 36),
        Segment(0, 3, 36, 40),
        Segment(0, 1, 40, 60),
        Segment(0, 3, 60, 70),
        Segment(0, 2, 70, 90),
        Segment(0, 3, 90, 100),
        Segment(1, 1, 0, 10),
        Segment(2, 2, 0, 4),
        Segment(3, 3, 0, 6),
    )
    assert plan.lends == (Lend(0, 0, 1, 20), Lend(0, 0, 2, 26), Lend(0, 0, 3, 24))
    assert plan.rank_loads == [30, 30, 30, 30]


def test_quota_uses_a_replica_first_and_lends_the_rest() -> None:
    """As above with a copy of expert 0 on rank 2, which needs no lend to fill its room of 26."""
    counts = np.array([[40, 10, 0, 0], [30, 0, 0, 0], [20, 0, 4, 0], [10, 0, 0, 6]])
    plan = plan_step("quota", counts, Placement((0, 1, 2, 3), (2,) * 4, replicas=((0, 2),)), ONE_BY_ONE)
    assert plan.lends == (Lend(0, 0, 1, 20), Lend(0, 0, 3, 24))
    assert plan.rank_loads == [30, 30, 30, 30]


def test_quota_uses_replicas_alone_where_they_do() -> None:
    counts = np.array([[30, 10], [30, 10]])
    plan = plan_step("quota", counts, Placement((0, 1), (1, 1), replicas=((0, 1),)), ONE_BY_ONE)
    assert plan.decision is Decision.REPLICA
    assert plan.rank_loads == [40, 40] and not plan.lends


@pytest.mark.parametrize(("chunk", "loads"), [(20, [50, 50, 50]), (21, [49, 50, 51]), (40, [70, 50, 30])])
def test_quota_lends_a_chunk_or_nothing(chunk: int, loads: list[int]) -> None:
    """Rank 0 has 20 too much. A chunk of 21 still helps, one of 40 would only change places."""
    counts = np.array([[70, 50, 30], [0] * 3, [0] * 3])
    plan = plan_step("quota", counts, Placement.linear(3, 3, 1), PlanOptions(min_chunk_tokens=chunk))
    assert plan.rank_loads == loads


def test_quota_levels_what_its_lends_carry() -> None:
    """Loads 560 and 400: at most 504 is asked for, and the one lend that this takes may as well reach the mean."""
    counts = np.array([[460, 100, 200, 200], [0] * 4])
    options = PlanOptions(imbalance_threshold=1.05, min_chunk_tokens=16)
    plan = plan_step("quota", counts, Placement.linear(4, 2, 1), options)
    assert plan.lends == (Lend(0, 0, 1, 80),)
    assert plan.rank_loads == [480, 480]


def test_quota_chains_lends_where_one_slot_per_rank_would_not_do() -> None:
    """Four ranks have too much, one slot each; rank 1 is nearly empty: rank 3 gives it most, and borrows in turn."""
    counts = np.zeros((5, 5), dtype=np.int64)
    counts[0] = [23124, 938, 23078, 23370, 23150]
    plan = plan_step(
        "quota", counts, Placement.linear(5, 5, 1), PlanOptions(imbalance_threshold=1.0, min_chunk_tokens=1)
    )
    assert imbalance_ratio(plan.rank_loads) <= 1.01


@pytest.mark.parametrize(
    ("rooms", "amount", "index"),
    [
        ([9, 7, 7, 3], 7, 1),  # the tightest that fits, lowest of equals
        ([9, 7, 4, 3], 12, 0),  # none fits, 9 + 3 do best
        ([9, 7, 4, 3], 11, 1),  # 7 + 4
        ([9, 7, 4, 3], 20, 0),  # no two do: the largest
        ([5], 6, 0),
    ],
)
def test_pick(rooms: list[int], amount: int, index: int) -> None:
    assert pick(rooms, amount) == index


def test_ways_are_tried_in_this_order() -> None:
    assert list(Way) == [Way.FIT, Way.REFILL, Way.SCARCE]


def test_a_hot_expert_goes_out_in_a_relay_tree() -> None:
    """Few receivers are served at once; from 4 on, whoever has the weights sends each round."""
    placement = Placement.linear(1, 8, 1)
    assert [hop.round for hop in relay({0: [1, 2, 3]}, placement, None)] == [0, 0, 0]
    assert relay({0: [1, 2, 3, 4, 5, 6, 7]}, placement, None) == (
        Transfer(0, 0, 1, 0),
        Transfer(0, 0, 2, 1),
        Transfer(0, 1, 3, 1),
        Transfer(0, 0, 4, 2),
        Transfer(0, 1, 5, 2),
        Transfer(0, 2, 6, 2),
        Transfer(0, 3, 7, 2),
    )


def test_weights_enter_a_node_once_and_go_on_from_there() -> None:
    hops = relay({0: [1, 4, 5, 6]}, Placement.linear(1, 8, 1), 4)
    assert hops == (Transfer(0, 0, 1, 0), Transfer(0, 0, 4, 0), Transfer(0, 4, 5, 1), Transfer(0, 4, 6, 1))


def test_lends_come_from_the_nearest_holder() -> None:
    """Expert 0 is at home on rank 0 and has a copy on rank 2; rank 3 borrows from rank 2, of its node."""
    counts = np.zeros((4, 2), dtype=np.int64)
    counts[0, 0] = 400
    placement = Placement((0, 1), (0, 0, 0, 1), replicas=((0, 2),))
    plan = plan_step("quota", counts, placement, PlanOptions(min_chunk_tokens=1, ranks_per_node=2))
    assert plan.lends == (Lend(0, 2, 3, plan.rank_loads[3]),)
    plan = plan_step("quota", counts, placement, ONE_BY_ONE)
    assert [lend.src_rank for lend in plan.lends] == [0]


@pytest.mark.parametrize("planner", ["quota", "least_loaded"])
@pytest.mark.parametrize(
    ("slots", "free_bytes", "threshold", "decision"),
    [
        (0, None, 1.3, Decision.NO_SLOT),
        (1, (9, 9), 1.3, Decision.MEMORY),
        (1, None, 2.1, Decision.BALANCED),
        (1, (10, 10), 1.3, Decision.LEND),
    ],
)
def test_the_reason_is_told(
    planner: str, slots: int, free_bytes: tuple[int, ...] | None, threshold: float, decision: Decision
) -> None:
    options = PlanOptions(imbalance_threshold=threshold, min_chunk_tokens=1, bytes_per_expert=10, free_bytes=free_bytes)
    plan = plan_step(planner, np.array([[8, 0], [8, 0]]), Placement.linear(2, 2, slots), options)
    assert plan.decision is decision


@pytest.mark.parametrize("planner", ["quota", "least_loaded"])
def test_no_gain_when_the_only_expert_is_too_small_to_split(planner: str) -> None:
    plan = plan_step(planner, np.array([[8, 0], [8, 0]]), Placement.linear(2, 2, 1), PlanOptions())
    assert plan.decision is Decision.NO_GAIN


@pytest.mark.parametrize("planner", ["quota", "least_loaded"])
def test_costs_decide_whether_it_pays(planner: str) -> None:
    """A large batch on fast links pays, and a tiny one that reads another expert's weights does not."""
    placement = Placement.linear(2, 2, 1)
    options = PlanOptions(min_chunk_tokens=1, cost_model=PRESETS["h200"])
    large = plan_step(planner, np.array([[200_000, 0], [200_000, 0]]), placement, options)
    assert large.decision is Decision.LEND and large.predicted_gain_s > 0.01
    tiny = plan_step(planner, np.array([[16, 0], [16, 0]]), placement, options)
    assert tiny.decision is Decision.NO_GAIN and tiny.predicted_gain_s == 0.0


def test_a_decode_step_is_left_alone_but_for_replicas() -> None:
    counts = np.array([[30, 10], [30, 10]])
    options = PlanOptions(min_chunk_tokens=1, phase="decode")
    assert plan_step("quota", counts, Placement.linear(2, 2, 1), options).decision is Decision.NO_GAIN
    plan = plan_step("quota", counts, Placement((0, 1), (1, 1), replicas=((0, 1),)), options)
    assert plan.decision is Decision.REPLICA and plan.rank_loads == [40, 40]


@pytest.mark.parametrize("planner", ["home", "least_loaded", "quota"])
def test_an_empty_batch_is_an_empty_plan(planner: str) -> None:
    plan = plan_step(planner, np.zeros((4, 8), dtype=np.int64), Placement.linear(8, 4, 2), PlanOptions())
    assert plan.segments == () and plan.rank_loads == [0, 0, 0, 0]
    assert plan.decision is (Decision.OFF if planner == "home" else Decision.BALANCED)


@pytest.mark.parametrize("planner", ["home", "least_loaded", "quota"])
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
def test_bad_counts_are_named(planner: str, counts: Counts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_step(planner, counts, Placement.linear(4, 2, 1), PlanOptions())


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
        plan_step("quota", np.zeros((2, 4), np.int64), Placement.linear(4, 2, 1), options)


@pytest.mark.parametrize(
    ("home_rank", "free_slots", "replicas", "message"),
    [
        ((), (), (), "at least 1 rank"),
        ((), (1,), (), "one entry per expert, got none"),
        ((0, None), (1, 1), (), r"home_rank must be a rank in 0\.\.1, got None for expert 1"),
        ((0, 2), (1, 1), (), r"home_rank must be a rank in 0\.\.1, got 2 for expert 1"),
        ((0, 1), (1, 3), (), r"free_slots must be in 0\.\.2 \(experts\), got 3 for rank 1"),
        ((0, 1), (1, -1), (), r"free_slots must be in 0\.\.2 \(experts\), got -1 for rank 1"),
        ((0, 1), (1, 1), ((0, 0),), "rank 0 would hold expert 0 twice"),
        ((0, 1), (1, 1), ((0, 1), (0, 1)), "rank 1 would hold expert 0 twice"),
        ((0, 1), (1, 1), ((2, 1),), r"experts 0\.\.1, got expert 2"),
        ((0, 1), (1, 1), ((0, 5),), r"replicas must be a rank in 0\.\.1, got 5 for expert 0"),
    ],
)
def test_bad_placements_are_named(home_rank: object, free_slots: object, replicas: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(home_rank, free_slots, replicas)  # type: ignore[arg-type]


@pytest.mark.parametrize(("planner", "most"), [("quota", 1.01), ("least_loaded", 1.01)])
def test_moving_load_lowers_the_imbalance_ratio(planner: str, most: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(16384, np.r_[[0.4], np.full(63, 0.6 / 63)], size=8)
    plan = plan_step(planner, counts, Placement.linear(64, 8, 8), PlanOptions())
    assert imbalance_ratio(plan.rank_loads) <= most
