"""Home ranks by MILP: what brute force finds, traffic kept together, a bound that holds, an answer when time is up."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from llep.generate import zipf_counts
from llep.placement import Placement
from llep.planning.milp import HomeOptions, HomePlan, plan_homes


def imbalance(loads_E: np.ndarray, home_E: np.ndarray, ep_size: int) -> float:
    return float(np.bincount(home_E, loads_E, ep_size).max() * ep_size / loads_E.sum())


def clustered(layers: int, experts: int, ranks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads and transitions of tokens that stay in hidden groups, one per rank, but for a little noise."""
    rng = np.random.default_rng(seed)
    groups = np.array([rng.permutation(np.arange(experts) % ranks) for _ in range(layers)])
    traffic = rng.random((layers - 1, experts, experts))
    for at in range(layers - 1):
        traffic[at][groups[at][:, None] == groups[at + 1]] += 100.0
    return np.concatenate([traffic.sum(axis=2), traffic[-1:].sum(axis=1)]), traffic


def assert_valid(plan: HomePlan, experts: int, ep_size: int) -> None:
    room = np.bincount(Placement.linear(experts, ep_size, 0).home_rank, minlength=ep_size)
    for home_E in plan.home_rank_LE:
        assert sorted(np.bincount(home_E, minlength=ep_size)) == sorted(room)
    assert all(0.0 <= gap <= 1.0 for gap in plan.gap_L)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("experts", "ep_size"), [(8, 2), (6, 3), (7, 3)])
def test_one_layer_is_as_good_as_brute_force(seed: int, experts: int, ep_size: int) -> None:
    loads_E = np.random.default_rng(seed).lognormal(sigma=1.0, size=experts)
    plan = plan_homes(loads_E[None], ep_size)
    assert_valid(plan, experts, ep_size)
    homes = set(itertools.permutations(Placement.linear(experts, ep_size, 0).home_rank))
    best = min(imbalance(loads_E, np.array(home), ep_size) for home in homes)
    assert plan.after.imbalance_L[0] == pytest.approx(best, rel=1e-6)
    assert plan.after.imbalance_L[0] == pytest.approx(imbalance(loads_E, plan.home_rank_LE[0], ep_size))
    assert plan.gap_L[0] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_two_layers_against_brute_force(seed: int) -> None:
    """Sweeps need not find the best pair of layers, but no layer alone can be bettered."""
    rng = np.random.default_rng(seed)
    traffic = rng.lognormal(sigma=1.5, size=(1, 6, 6))
    loads = np.concatenate([traffic.sum(axis=2), traffic.sum(axis=1)])
    plan = plan_homes(loads, 3, traffic, HomeOptions(rank_weight=1.0))
    homes = [np.array(home) for home in set(itertools.permutations((0, 0, 1, 1, 2, 2)))]

    def cost(first: np.ndarray, second: np.ndarray) -> float:
        crossing = traffic[0][first[:, None] != second].sum() / traffic.sum()
        return (imbalance(loads[0], first, 3) + imbalance(loads[1], second, 3) + crossing) / 2

    first, second = plan.home_rank_LE
    assert plan.after.cost == pytest.approx(cost(first, second))
    assert plan.after.cost <= min(cost(home, second) for home in homes) + 1e-6
    assert plan.after.cost <= min(cost(first, home) for home in homes) + 1e-6
    assert plan.after.cost <= 1.1 * min(cost(a, b) for a, b in itertools.product(homes, homes))


@pytest.mark.parametrize("seed", range(3))
def test_experts_visited_in_turn_come_together(seed: int) -> None:
    loads, traffic = clustered(layers=4, experts=16, ranks=4, seed=seed)
    plan = plan_homes(loads, 4, traffic, HomeOptions(ranks_per_node=2, time_limit_s=30))
    assert_valid(plan, 16, 4)
    assert plan.before.other_rank_share > 0.6 and plan.before.other_node_share > 0.3
    assert plan.after.other_rank_share < 0.06 and plan.after.other_node_share < 0.04
    assert max(plan.after.imbalance_L) < 1.2
    balanced = plan_homes(loads, 4, traffic, HomeOptions(rank_weight=0.0, node_weight=0.0))
    assert max(balanced.after.imbalance_L) <= max(plan.after.imbalance_L) + 1e-6


def test_nodes_count_more_than_ranks() -> None:
    loads, traffic = clustered(layers=3, experts=16, ranks=2, seed=1)
    plan = plan_homes(loads, 4, traffic, HomeOptions(ranks_per_node=2, rank_weight=0.01, node_weight=1.0))
    assert plan.after.other_node_share < 0.06 < plan.after.other_rank_share


def test_when_the_time_is_up_the_greedy_answer_stands_with_its_gap() -> None:
    loads = np.stack([zipf_counts(32, 128, 8192, 2.0, seed).sum(axis=0) for seed in range(3)])
    started_s = time.monotonic()
    none = plan_homes(loads, 32, options=HomeOptions(time_limit_s=0.0))
    short = plan_homes(loads, 32, options=HomeOptions(time_limit_s=0.5))
    assert time.monotonic() - started_s < 60
    for plan in (none, short):
        assert_valid(plan, 128, 32)
        assert plan.after.cost < plan.before.cost
        for ratio, gap in zip(plan.after.imbalance_L, plan.gap_L, strict=True):
            assert ratio * (1 - gap) >= 1.0 - 1e-9
    assert none.is_greedy_L == (True,) * 3
    assert short.after.cost <= none.after.cost + 1e-9


def test_the_same_arguments_give_the_same_plan_without_the_solver() -> None:
    loads, traffic = clustered(layers=3, experts=16, ranks=4, seed=0)
    plans = [plan_homes(loads, 4, traffic, HomeOptions(time_limit_s=0.0)).home_rank_LE for _ in range(2)]
    assert (plans[0] == plans[1]).all()


def test_layers_without_tokens_and_single_ranks() -> None:
    plan = plan_homes(np.zeros((2, 8)), 4, np.zeros((1, 8, 8)))
    assert_valid(plan, 8, 4)
    assert plan.after.imbalance_L == (1.0, 1.0) and plan.after.other_rank_share == 0.0
    assert (plan_homes(np.ones((1, 4)), 1).home_rank_LE == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(4), 2), r"loads must have shape \(layers, experts\), got \(4,\)"),
        ((np.ones((1, 4)), 0), "ep_size must be between 1 and the number of experts, 4, got 0"),
        ((np.ones((1, 4)), 5), "ep_size must be between 1 and the number of experts, 4, got 5"),
        ((-np.ones((1, 4)), 2), "loads must be finite and >= 0"),
        ((np.full((1, 4), np.nan), 2), "loads must be finite and >= 0"),
        ((np.ones((2, 4)), 2, np.ones((1, 4, 3))), r"transitions must have shape \(1, 4, 4\), got \(1, 4, 3\)"),
        ((np.ones((2, 4)), 2, -np.ones((1, 4, 4))), "transitions must be finite and >= 0"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_homes(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node must be at least 1, got 0"),
        ({"rank_weight": float("nan")}, "rank_weight must be a number >= 0, got nan"),
        ({"time_limit_s": -1.0}, "time_limit_s must be a number >= 0, got -1.0"),
        ({"max_sweeps": 0}, "max_sweeps must be at least 1, got 0"),
    ],
)
def test_bad_options(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HomeOptions(**changes)
