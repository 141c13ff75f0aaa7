"""Replicas: within every budget, no two copies on one rank, bytes where they pay most, and noise moves nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from llep.generate import Workload, generate_steps
from llep.placement import Placement
from llep.planning.eplb import plan_eplb
from llep.planning.replicas import Forecast, Replica, ReplicaLimits, plan_replicas
from llep.planning.split import Parts, Split
from llep.shapes import ModelShape

LAYERS, EXPERTS, RANKS = 4, 64, 8
SHAPE = ModelShape(name="small", layer_numbers=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=4)
HOME = np.tile(np.array(Placement.linear(EXPERTS, RANKS, 0).home_rank), (LAYERS, 1))


def windows(workload: Workload, count: int, tokens_per_rank: int = 4096, seed: int = 0) -> list[np.ndarray]:
    steps = generate_steps(workload, SHAPE, num_ranks=RANKS, tokens_per_rank=tokens_per_rank, steps=count, seed=seed)
    return [step.counts_LRE.sum(axis=1) for step in steps]


def forecast_of(loads: list[np.ndarray], smoothing: float | None = None) -> Forecast:
    forecast = Forecast.start(*loads[0].shape, smoothing=smoothing)
    for window in loads:
        forecast = forecast.seen(window)
    return forecast


def limits(copies_per_rank: int, **changes: object) -> ReplicaLimits:
    return ReplicaLimits(**{"budget_bytes": (copies_per_rank * 100,) * RANKS, "bytes_per_expert": 100, **changes})


def assert_valid(replicas: tuple[Replica, ...], home: np.ndarray, allowed: ReplicaLimits) -> None:
    held = {(at, expert, int(rank)) for at, layer in enumerate(home) for expert, rank in enumerate(layer)}
    for copy in replicas:
        assert copy not in held, f"{copy} is a second copy on its rank"
        held.add(copy)
    used = np.bincount([copy.rank for copy in replicas], minlength=len(allowed.budget_bytes)) * allowed.bytes_per_expert
    assert (used <= np.array(allowed.budget_bytes)).all()
    assert list(replicas) == sorted(replicas)


def best_highest_load(loads_E: np.ndarray, holders: list[list[int]], num_ranks: int) -> float:
    """The least highest rank load over all fractional splits, by linear programming."""
    pairs = [(expert, rank) for expert, ranks in enumerate(holders) for rank in ranks]
    per_expert = np.zeros((len(loads_E), len(pairs) + 1))
    per_rank = np.zeros((num_ranks, len(pairs) + 1))
    per_rank[:, -1] = -1.0
    for column, (expert, rank) in enumerate(pairs):
        per_expert[expert, column] = per_rank[rank, column] = 1.0
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    found = linprog(cost, A_ub=per_rank, b_ub=np.zeros(num_ranks), A_eq=per_expert, b_eq=loads_E)
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("seed", range(40))
def test_the_split_has_the_least_highest_load_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts, num_ranks = int(rng.integers(4, 40)), int(rng.integers(2, 9))
    loads_E = rng.lognormal(sigma=1.5, size=num_experts)
    home_E = rng.integers(0, num_ranks, num_experts)
    split = Split(loads_E, home_E, num_ranks)
    holders = [[int(rank)] for rank in home_E]
    for expert, rank in zip(
        rng.integers(0, num_experts, 20).tolist(), rng.integers(0, num_ranks, 20).tolist(), strict=True
    ):
        if rank not in holders[expert]:
            holders[expert].append(rank)
            split.add([(expert, rank)])
    assert split.highest_load == pytest.approx(best_highest_load(loads_E, holders, num_ranks), rel=1e-4)
    assert sum(load for expert in range(num_experts) for _, load in split.shares(expert)) == pytest.approx(
        loads_E.sum()
    )
    for expert, rank in split.copies():
        without = split.without(expert, rank)
        split.drop(expert, rank)
        assert split.highest_load <= without.highest_load * (1 + 1e-5)
        assert sum(without.rank_loads) == pytest.approx(loads_E.sum())
    assert split.copies() == []
    assert split.rank_loads == pytest.approx(np.bincount(home_E, loads_E, num_ranks))


def test_a_rank_sheds_one_hot_expert_after_the_other() -> None:
    split = Split(np.array([6.0, 6.0, 1.0, 1.0, 1.0]), np.array([0, 0, 1, 2, 3]), 4)
    copies = split.copies_for(3.75, [9] * 4, least_load=0.1)
    assert copies == [(0, 1), (0, 2), (0, 3), (1, 3)]  # 6 of expert 0 and 2.25 of expert 1 go
    assert split.with_copies(copies).highest_load == pytest.approx(3.75, rel=1e-2)
    assert split.copies_for(3.75, [9, 9, 9, 0], least_load=0.1) is None
    assert split.copies_for(3.75, [9] * 4, least_load=3.0) is None


@pytest.mark.parametrize("seed", range(30))
def test_within_every_limit_from_any_start(seed: int) -> None:
    rng = np.random.default_rng(seed)
    home = np.array([rng.permutation(np.arange(EXPERTS) % RANKS) for _ in range(LAYERS)])
    present = {
        Replica(int(at), int(expert), int(rank))
        for at, expert, rank in zip(
            rng.integers(0, LAYERS, 30), rng.integers(0, EXPERTS, 30), rng.integers(0, RANKS, 30), strict=True
        )
        if home[at, expert] != rank
    }
    allowed = ReplicaLimits(
        budget_bytes=tuple(int(b) for b in rng.integers(0, 1000, RANKS)),
        bytes_per_expert=100,
        max_added=None if seed % 3 else 5,
    )
    forecast = forecast_of(windows(Workload(kind="lognormal", ratio=2.5), 8, seed=seed))
    plan = plan_replicas(forecast, home, present, allowed)
    assert_valid(plan.replicas, home, allowed)
    assert set(plan.replicas) == (present | set(plan.added)) - set(plan.dropped)
    assert not set(plan.added) & present and set(plan.dropped) <= present
    assert len(plan.added) <= (allowed.max_added or 1000)
    assert plan == plan_replicas(forecast, home, sorted(present, reverse=True), allowed)


def test_skew_is_spread() -> None:
    plan = plan_replicas(forecast_of(windows(Workload(kind="zipf", ratio=2.5), 10)), HOME, (), limits(LAYERS * 2))
    assert min(plan.imbalance_before_L) > 2.4
    assert max(plan.imbalance_after_L) < 1.08


def test_one_hot_expert_that_eplb_cannot_spread() -> None:
    loads = windows(Workload(kind="paper", share=0.95, experts=1), 8)
    plan = plan_replicas(forecast_of(loads), HOME, (), limits(LAYERS))
    assert min(plan.imbalance_before_L) > 7
    assert max(plan.imbalance_after_L) < 1.02
    slots = plan_eplb(loads[0][:1], EXPERTS + RANKS, RANKS)[0]
    copies = np.bincount(slots, minlength=EXPERTS)
    eplb = (loads[0][0] / copies)[slots].reshape(RANKS, -1).sum(axis=1)
    assert eplb.max() / eplb.mean() > 1.5


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tokens_per_rank", [16, 4096])
def test_noise_moves_nothing(seed: int, tokens_per_rank: int) -> None:
    forecast = Forecast.start(LAYERS, EXPERTS)
    for window in windows(Workload(), 80, tokens_per_rank, seed):
        forecast = forecast.seen(window)
        assert plan_replicas(forecast, HOME, (), limits(100)).replicas == ()


def test_hot_spots_that_move_with_every_window_move_little() -> None:
    forecast, placed, moved = Forecast.start(LAYERS, EXPERTS), (), 0
    rounds = windows(Workload(kind="rotating", ratio=3.0, period=1), 40)
    for window in rounds:
        forecast = forecast.seen(window)
        plan = plan_replicas(forecast, HOME, placed, limits(LAYERS))
        placed, moved = plan.replicas, moved + len(plan.added)
    # Copies of any rank's experts help now and then. To follow every hot spot would take more than this each time.
    assert moved / len(rounds) < RANKS * LAYERS / 4


def test_a_single_burst_moves_nothing() -> None:
    forecast = Forecast.start(LAYERS, EXPERTS)
    for window in windows(Workload(kind="burst", ratio=4.0, period=25), 60):
        forecast = forecast.seen(window)
        assert plan_replicas(forecast, HOME, (), limits(100)).replicas == ()


@pytest.mark.parametrize("seed", range(3))
def test_under_stable_skew_nothing_moves_any_more(seed: int) -> None:
    loads = windows(Workload(kind="zipf", ratio=2.0), 60, tokens_per_rank=256, seed=seed)
    forecast = forecast_of(loads[:30])
    placed = plan_replicas(forecast, HOME, (), limits(8)).replicas
    assert placed
    moved = 0
    for window in loads[30:]:
        forecast = forecast.seen(window)
        plan = plan_replicas(forecast, HOME, placed, limits(8))
        moved += len(plan.added)
        placed = plan.replicas
    assert moved <= 3


def test_bytes_go_to_the_layers_where_they_pay_most() -> None:
    flat, skewed = windows(Workload(), 8), windows(Workload(kind="zipf", ratio=3.0), 8)
    loads = [np.concatenate([quiet[:3], hot[3:]]) for quiet, hot in zip(flat, skewed, strict=True)]
    plan = plan_replicas(forecast_of(loads), HOME, (), limits(2))
    assert {copy.layer for copy in plan.replicas} == {3}
    # An equal share for each layer would be less than one copy per rank here: none at all.
    assert plan.imbalance_before_L[3] > 2.9
    assert plan.imbalance_after_L[3] < 1.2


def test_a_layer_with_more_traffic_comes_first() -> None:
    loads = windows(Workload(kind="paper", share=0.5, experts=1), 8)
    weighted = [window * np.array([[1], [1], [20], [1]]) for window in loads]
    plan = plan_replicas(forecast_of(weighted), HOME, (), limits(1))
    assert sum(copy.layer == 2 for copy in plan.replicas) == RANKS - 1


def test_when_the_skew_moves_what_became_idle_makes_room() -> None:
    before = windows(Workload(kind="zipf", ratio=2.5), 10, seed=1)
    after = windows(Workload(kind="zipf", ratio=2.5), 40, seed=2)
    allowed = limits(LAYERS)
    first = plan_replicas(forecast_of(before), HOME, (), allowed)
    second = plan_replicas(forecast_of(after), HOME, first.replicas, allowed)
    assert_valid(second.replicas, HOME, allowed)
    assert second.dropped and second.added
    fresh = plan_replicas(forecast_of(after), HOME, (), allowed)
    assert np.mean(second.imbalance_after_L) < np.mean(fresh.imbalance_after_L) + 0.1
    assert len(second.added) < RANKS * LAYERS


def test_fewer_copies_move_than_eplb_moves() -> None:
    allowed, placed, slots = limits(LAYERS), (), None
    moved = moved_by_eplb = 0
    forecast = Forecast.start(LAYERS, EXPERTS, smoothing=0.2)
    for at, window in enumerate(windows(Workload(kind="lognormal", ratio=2.0, drift=0.02), 40)):
        forecast = forecast.seen(window)
        if at % 10 == 9:
            plan = plan_replicas(forecast, HOME, placed, allowed)
            moved += len(plan.added)
            placed = plan.replicas
            new = plan_eplb(np.array([forecast.share(at) for at in range(LAYERS)]), EXPERTS + RANKS, RANKS).reshape(
                LAYERS, RANKS, -1
            )
            old = np.tile(np.arange(EXPERTS).reshape(RANKS, -1), (LAYERS, 1, 1)) if slots is None else slots
            moved_by_eplb += sum(
                len(set(new[at, rank].tolist()) - set(old[at, rank].tolist()))
                for at in range(LAYERS)
                for rank in range(RANKS)
            )
            slots = new
    assert 0 < moved < moved_by_eplb / 4


def test_a_smaller_budget_drops_what_is_missed_least() -> None:
    forecast = forecast_of(windows(Workload(kind="zipf", ratio=2.5), 10))
    wide = plan_replicas(forecast, HOME, (), limits(8))
    narrow = plan_replicas(forecast, HOME, wide.replicas, limits(2))
    assert_valid(narrow.replicas, HOME, limits(2))
    assert plan_replicas(forecast, HOME, wide.replicas, limits(0)).replicas == ()


def test_few_windows_say_nothing() -> None:
    forecast = forecast_of(windows(Workload(kind="zipf", ratio=3.0), 3))
    assert plan_replicas(forecast, HOME, (), limits(8)).replicas == ()
    empty = forecast_of([np.zeros((LAYERS, EXPERTS))] * 9)
    plan = plan_replicas(empty, HOME, (), limits(8))
    assert plan.replicas == () and plan.imbalance_before_L == (1.0,) * LAYERS


def test_the_forecast_is_a_weighted_mean_that_forgets() -> None:
    loads = windows(Workload(kind="zipf", ratio=2.0), 3)
    forecast = forecast_of(loads, smoothing=0.5)
    shares = [window[1] / window[1].sum() for window in loads]
    assert forecast.share(1) == pytest.approx((shares[0] + 2 * shares[1] + 4 * shares[2]) / 7)
    assert forecast.pairs(1) == pytest.approx(4096 * RANKS * 4)
    for _ in range(50):
        forecast = forecast.seen(loads[0])
    assert forecast.share(1) == pytest.approx(shares[0], abs=1e-5)
    assert len(forecast.pairs_WL) == 6
    silent = forecast.seen(np.zeros((LAYERS, EXPERTS)))
    assert silent.share(1) == pytest.approx(forecast.share(1))
    assert silent.windows(1) == 5


def test_after_a_change_at_once_only_windows_since_then_count() -> None:
    before, after = (windows(Workload(kind="zipf", ratio=2.0), 12, seed=seed) for seed in (1, 2))
    after = [np.concatenate([new[:2], old[2:]]) for new, old in zip(after, before, strict=True)]  # in layers 0 and 1
    for passed in range(1, 13):
        forecast = forecast_of(before + after[:passed])
        since = passed if passed >= 4 else 12 + passed
        assert [forecast.windows(at) for at in range(LAYERS)] == [since, since, 12 + passed, 12 + passed]
        assert forecast.changed_windows_ago == (passed if passed >= 4 else None)
    alone = forecast_of(after)
    assert forecast.share(0) == pytest.approx(alone.share(0)) and forecast.smoothing_L[0] == alone.smoothing_L[0]
    # Another change later: only what came after the last one.
    again = forecast_of(before + after[:5] + before[:4])
    assert [again.windows(at) for at in range(LAYERS)] == [4, 4, 21, 21]


def test_after_a_change_at_once_full_ranks_are_filled_anew_in_one_plan() -> None:
    before, after = (windows(Workload(kind="zipf", ratio=2.0), 12, seed=seed) for seed in (1, 2))
    placed = plan_replicas(forecast_of(before), HOME, (), limits(LAYERS)).replicas
    mixed = plan_replicas(forecast_of(before + after[:3]), HOME, placed, limits(LAYERS))
    settled = plan_replicas(forecast_of(before + after[:4]), HOME, placed, limits(LAYERS))
    fresh = plan_replicas(forecast_of(after[:4]), HOME, (), limits(LAYERS))
    assert len(mixed.added) < len(settled.added)
    assert np.mean(settled.imbalance_after_L) < 1.05 < 1.2 < np.mean(mixed.imbalance_after_L)
    assert np.mean(settled.imbalance_after_L) < np.mean(fresh.imbalance_after_L) + 0.02


@pytest.mark.parametrize(
    "workload",
    [
        Workload(),
        Workload(kind="zipf", ratio=2.0),
        Workload(kind="burst", ratio=4.0, period=25),
        Workload(kind="rotating", ratio=3.0, period=1),
        Workload(kind="rotating", ratio=3.0, period=2),
    ],
)
@pytest.mark.parametrize("tokens_per_rank", [16, 4096])
def test_noise_and_bursts_are_no_change_at_once(workload: Workload, tokens_per_rank: int) -> None:
    loads = windows(workload, 60, tokens_per_rank)
    for end in range(8, len(loads), 3):
        assert forecast_of(loads[max(end - 29, 0) : end]).changed_windows_ago is None
    # Nor are windows without tokens.
    assert forecast_of(loads[:10] + [np.zeros((LAYERS, EXPERTS))] * 6 + loads[10:20]).changed_windows_ago is None


def test_a_slow_change_is_none_at_once() -> None:
    before, after = (windows(Workload(kind="zipf", ratio=2.0), 40, seed=seed) for seed in (1, 2))
    shares = np.linspace(0.0, 1.0, 40)
    loads = [(1.0 - share) * old + share * new for share, old, new in zip(shares, before, after, strict=True)]
    for end in range(8, len(loads)):
        assert forecast_of(loads[max(end - 29, 0) : end]).changed_windows_ago is None


def test_a_gain_is_judged_window_by_window() -> None:
    def gain_of(forecast: Forecast) -> tuple[float, float]:
        return forecast.gain(0, *(forecast.rank_loads(0, parts(shares), 2) for shares in ([1, 0, 1], [0.5, 0.5, 1])))

    steady = forecast_of([np.array([[300, 100, 0]])] * 20, smoothing=0.1)
    gain, error = gain_of(steady)
    assert gain == pytest.approx(0.75 - 0.625) and error < 0.1 * gain
    to_and_fro = forecast_of([np.array([[300, 100, 0]]), np.array([[100, 100, 200]])] * 10, smoothing=0.1)
    gain, error = gain_of(to_and_fro)
    assert abs(gain) < error
    assert gain_of(forecast_of([np.array([[300, 100, 0]])]))[1] == np.inf


def parts(shares: list[float]) -> Parts:
    """Experts 0 and 2 split over ranks 0 and 1, expert 1 on rank 1."""
    first, second, third = shares
    pairs = [(0, 0, first), (0, 1, second), (1, 1, 1.0), (2, 1, third), (2, 0, 1.0 - third)]
    expert_N, rank_N, part_N = zip(*pairs, strict=True)
    return Parts(np.array(expert_N), np.array(rank_N), np.array(part_N))


def test_smoothing_is_little_under_noise_and_much_under_drift() -> None:
    noisy = forecast_of(windows(Workload(kind="zipf", ratio=2.0), 30, tokens_per_rank=64), smoothing=None)
    drifting = forecast_of(windows(Workload(kind="zipf", ratio=2.0, drift=0.1), 30), smoothing=None)
    assert (noisy.smoothing_L == 0.1).all()
    assert (drifting.smoothing_L > 0.1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"home": HOME[:2]}, r"home ranks must have shape \(4, 64\), got \(2, 64\)"),
        ({"home": HOME + 1}, "home ranks must be in 0..7"),
        ({"present": [Replica(0, 0, 0)]}, "is on the expert's home rank"),
        ({"present": [Replica(0, 99, 1)]}, "is not within 4 layers, 64 experts, 8 ranks"),
        ({"present": [Replica(0, 0, 1), Replica(0, 0, 1)]}, "must differ from each other"),
    ],
)
def test_what_contradicts_itself(changes: dict, message: str) -> None:
    forecast = forecast_of(windows(Workload(), 4))
    with pytest.raises(ValueError, match=message):
        plan_replicas(forecast, changes.get("home", HOME), changes.get("present", ()), limits(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes_per_expert": 0}, "bytes_per_expert must be at least 1, got 0"),
        ({"budget_bytes": (1, -5)}, "budget_bytes must be >= 0, got -5 for rank 1"),
        ({"min_gain_ratio": float("nan")}, "min_gain_ratio must be a number >= 0, got nan"),
        ({"min_windows": 1}, "min_windows must be at least 2, got 1"),
    ],
)
def test_bad_limits(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits(1, **changes)


def test_bad_windows() -> None:
    forecast = Forecast.start(2, 3)
    with pytest.raises(ValueError, match=r"loads must have shape \(2, 3\)"):
        forecast.seen(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="finite and >= 0"):
        forecast.seen(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="smoothing must be above 0 and below 1, got 1.5"):
        Forecast.start(2, 3, smoothing=1.5)
