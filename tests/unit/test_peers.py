"""Peers plan what their descriptions say, and the optimum is one: nothing within the same limits is better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llep.generate import zipf_counts
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.plan import Decision, Plan, check_plan
from llep.planning.eplb import plan_eplb
from llep.planning.options import PlanOptions
from llep.planning.peers import copies_of, plan_even_split, plan_exact, plan_lp_split, plan_optimum
from llep.planning.split import Split

OPEN = PlanOptions(imbalance_threshold=1.0, min_chunk_tokens=1)


def loads_of(num_ranks: int, num_experts: int, ratio: float, seed: int) -> np.ndarray:
    return zipf_counts(num_ranks, num_experts, 2048, ratio, seed).sum(axis=0)


def assert_whole(plan: Plan, tokens_E: np.ndarray) -> None:
    """Every token once; a peer with other homes than plain EP may well have a higher load, so that is not checked."""
    segments = plan.segments_S4
    done = np.bincount(segments[:, 0], segments[:, 3] - segments[:, 2], len(tokens_E))
    assert (done == tokens_E).all()
    for expert, rows in itertools.groupby(segments.tolist(), key=lambda row: row[0]):
        position = 0
        for _, _, start, stop in rows:
            assert start == position < stop
            position = stop
        assert position == tokens_E[expert]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_even_and_lp_split_over_eplbs_copies(seed: int, extra: int) -> None:
    tokens_E = loads_of(8, 32, 2.0, seed)
    slots = plan_eplb(loads_of(8, 32, 2.0, seed + 100)[None], 32 + 8 * extra, 8)[0]
    copies = copies_of(slots, 32, 8)
    even, best = plan_even_split(tokens_E, copies), plan_lp_split(tokens_E, copies)
    for plan in (even, best):
        assert_whole(plan, tokens_E)
        assert plan.lends == ()
    number = np.bincount(slots, minlength=32)
    expected = (tokens_E / number)[slots].reshape(8, -1).sum(axis=1)
    assert np.array(even.rank_loads) == pytest.approx(expected, abs=len(slots) / 8)
    split = Split(tokens_E.astype(float), copies.placement.home_rank_E, 8)
    split.add(copies.placement.replicas)
    assert max(best.rank_loads) == pytest.approx(split.highest_load, abs=6)
    assert max(best.rank_loads) <= max(even.rank_loads) + 6
    if not extra:
        assert best.rank_loads == even.rank_loads


def test_two_copies_on_one_rank_are_one_holder() -> None:
    copies = copies_of(np.array([0, 0, 1, 0]), 2, 2)
    assert copies.placement.home_rank == (0, 1) and copies.placement.replicas == ((0, 1),)
    plan = plan_even_split(np.array([9, 4]), copies)
    assert_whole(plan, np.array([9, 4]))
    assert plan.rank_loads == [6, 7]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(4, 16), (8, 64), (7, 30), (1, 4)])
def test_exact_balance_is_exact_with_one_source_per_rank(seed: int, shape: tuple[int, int]) -> None:
    num_ranks, num_experts = shape
    tokens_E = np.random.default_rng(seed).zipf(1.3, num_experts).clip(max=5000)
    placement = Placement.linear(num_experts, num_ranks, 0)
    plan = plan_exact(tokens_E, placement)
    assert_whole(plan, tokens_E)
    assert max(plan.rank_loads) - min(plan.rank_loads) <= 1
    sources: dict[int, set[int]] = {}
    for lend in plan.lends:
        sources.setdefault(lend.dst_rank, set()).add(placement.home_rank[lend.expert])
    assert all(len(homes) == 1 for homes in sources.values())
    assert len(plan.lends) <= num_experts + num_ranks


def test_exact_by_hand() -> None:
    placement = Placement.linear(4, 2, 0)
    plan = plan_exact(np.array([10, 4, 1, 1]), placement)
    assert [tuple(segment) for segment in plan.segments] == [
        (0, 0, 0, 4),
        (0, 1, 4, 10),
        (1, 0, 0, 4),
        (2, 1, 0, 1),
        (3, 1, 0, 1),
    ]
    assert plan_exact(np.array([2, 2, 2, 2]), placement).decision is Decision.BALANCED
    assert plan_exact(np.array([0, 0, 0, 0]), placement).segments == ()


def all_plans(tokens_E: np.ndarray, placement: Placement, max_lends: int) -> int:
    """The least highest load over every choice of lends within the slots, split as well as can be."""
    pairs = [
        (expert, rank)
        for expert in range(placement.num_experts)
        for rank in range(placement.ep_size)
        if rank not in placement.holders[expert]
    ]
    best = max(home_loads(tokens_E, placement.home_rank, placement.ep_size))
    for count in range(max_lends + 1):
        for lends in itertools.combinations(pairs, count):
            used = np.bincount([rank for _, rank in lends], minlength=placement.ep_size)
            if (used <= np.array(placement.free_slots)).all():
                split = Split(tokens_E.astype(float), placement.home_rank_E, placement.ep_size)
                split.add([*placement.replicas, *lends])
                best = min(best, int(np.ceil(split.highest_load - 1e-3)))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("replicas", [(), ((0, 2),)])
def test_the_optimum_equals_trying_everything(seed: int, replicas: tuple[tuple[int, int], ...]) -> None:
    tokens_E = np.random.default_rng(seed).integers(0, 100, 6)
    placement = Placement((0, 0, 1, 1, 2, 2), (1, 0, 1), replicas)
    found = plan_optimum(tokens_E, placement, OPEN)
    assert found.gap == 0.0
    check_plan(found.plan, tokens_E)
    assert max(found.plan.rank_loads) == all_plans(tokens_E, placement, 2)


@pytest.mark.parametrize("seed", range(2))
def test_the_optimum_keeps_limits_and_is_below_what_others_reach(seed: int) -> None:
    tokens_E = loads_of(6, 12, 2.0, seed)
    placement = Placement.linear(12, 6, 1)
    free = plan_optimum(tokens_E, placement, OPEN).plan
    check_plan(free, tokens_E)
    limits = PlanOptions(bytes_per_expert=10, free_bytes=(9, 99, 99, 10, 0, 10), max_lend_bytes=20)
    tight = plan_optimum(tokens_E, placement, limits).plan
    check_plan(tight, tokens_E)
    assert len(tight.lends) <= 2 and not {lend.dst_rank for lend in tight.lends} & {0, 4}
    near = plan_optimum(tokens_E, placement, PlanOptions(ranks_per_node=3, lend_scope="node")).plan
    check_plan(near, tokens_E)
    assert all(lend.src_rank // 3 == lend.dst_rank // 3 for lend in near.lends)
    assert max(free.rank_loads) <= min(max(tight.rank_loads), max(near.rank_loads))


def test_the_optimum_takes_the_fewest_lends_for_its_load() -> None:
    # Rank 0 is 60 above the mean of 100, ranks 1 and 2 are 30 below: two lends, however many slots there are.
    found = plan_optimum([80, 80, 35, 35, 35, 35], Placement.linear(6, 3, 2), OPEN)
    assert found.plan.rank_loads == [100, 100, 100]
    assert len(found.plan.lends) == 2


def test_the_optimum_of_nothing_and_of_millions() -> None:
    placement = Placement.linear(4, 2, 1)
    assert plan_optimum([0, 0, 0, 0], placement, OPEN).plan.decision is Decision.BALANCED
    tokens_E = np.array([40_000_001, 3, 2_000_000, 5])
    plan = plan_optimum(tokens_E, placement, OPEN).plan
    check_plan(plan, tokens_E)
    assert len(plan.lends) == 1 and imbalance_ratio(plan.rank_loads) < 1.001
    none = plan_optimum(tokens_E, Placement.linear(4, 2, 0), OPEN).plan
    assert none.decision is Decision.NO_SLOT and none.lends == ()
