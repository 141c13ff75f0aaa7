"""Decisions follow from evidence: sure gains and losses are told from chance, changes stay within what people set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from llep.config import Settings
from llep.cost import CostModel, Link, cost_model
from llep.messages import STEP_PHASES
from llep.planning.replicas import Forecast, Replica
from llep.scheduler.decide import (
    BRAKE_S,
    FORGIVE_AFTER_S,
    LONGEST_BRAKE_S,
    STEP_FACTOR,
    Brake,
    advise,
    decide_brake,
    decide_thresholds,
)
from llep.scheduler.decide_placement import FEWEST_ROUNDS, Ground, decide_placement, refusal, room
from llep.scheduler.evidence import Evidence, measured_gain
from llep.scheduler.rings import Increments, Ring

NOW_S = 1e6


def worth(
    gain_ratio: float, windows: int = 30, noise: float = 0.05, probed_steps: float = 2.0, seed: int = 0, phase: int = 0
) -> np.ndarray[Any, Any]:
    """Windows [N, P, 6] of lending that saves gain_ratio of plain EP's time, give or take noise; in one phase only."""
    rng = np.random.default_rng(seed)
    lent = 1.0 - gain_ratio + noise * rng.standard_normal(windows)
    probed = 1.0 + noise * rng.standard_normal(windows)
    found = np.zeros((windows, 2, 6))
    found[:, phase] = np.stack(
        [
            *(lent, np.full(windows, 1000.0), np.full(windows, 40.0)),
            *(0.01 * probed * probed_steps, np.full(windows, 10.0 * probed_steps), np.full(windows, probed_steps)),
        ],
        axis=1,
    )
    return found


def evidence(**changes: Any) -> Evidence:
    """An engine that lends in prefill, over ten minutes."""
    values: dict[str, Any] = {
        "settings": Settings(min_batch_tokens=100),
        "window_s": 600.0,
        "ep_size": 8,
        "num_layers": 10,
        "top_k": 4,
        "bytes_per_expert": 1 << 20,
        "is_one_node": True,
        "cost_model": None,
        "tokens_P": np.array([600_000.0, 6000.0]),
        "layer_steps_P": np.array([3000.0, 3000.0]),
        "before_P": np.array([1.8, 1.6]),
        "after_P": np.array([1.05, 1.6]),
        "layer_seconds_P": np.array([60.0, 10.0]),
        "phase_seconds": {"count": 1.0, "plan": 1.0, "lend": 5.0, "dispatch": 5.0, "compute": 50.0, "combine": 8.0},
        "lends": 8000.0,
        "lend_bytes": 8e9,
        "decisions": {"lend": 3000.0},
        "predicted_gain_s": 0.0,
        "worth_NPW": worth(0.2),
        **changes,
    }
    return Evidence(**values)


@given(st.floats(-0.5, 0.5), st.integers(0, 1000))
def test_the_measured_gain_is_the_real_one_within_its_error(gain_ratio: float, seed: int) -> None:
    found = measured_gain(worth(gain_ratio, windows=60, seed=seed))
    assert found is not None
    assert found.ratio == pytest.approx(gain_ratio, abs=max(6 * found.error, 0.02))
    assert 0.0 < found.error < 0.03


def test_batch_sizes_cancel_out_of_the_gain() -> None:
    windows = worth(0.2, noise=0.0)
    large = windows.copy()
    large[:, 0, :2] *= 100.0  # lending steps had a hundred times the pairs, in a hundred times the time
    before, after = measured_gain(windows), measured_gain(large)
    assert before is not None and after is not None and after.ratio == pytest.approx(before.ratio)


@pytest.mark.parametrize(
    "windows",
    [worth(0.2, windows=3), worth(0.2, probed_steps=0.0), worth(0.2, windows=4, probed_steps=1), worth(0)[:0]],
)
def test_few_probes_are_no_evidence(windows: np.ndarray[Any, Any]) -> None:
    assert measured_gain(windows) is None


VERDICTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "active, gains": ({}, "worth_it", {}),
    "active, loses": ({"worth_NPW": worth(-0.2)}, "not_worth_it", {"mode": "observe"}),
    "active, chance": ({"worth_NPW": worth(0.001, noise=0.3)}, "not_enough_evidence", {}),
    "active, no probes": ({"worth_NPW": worth(0.2, probed_steps=0)}, "not_enough_evidence", {}),
    "observe, skewed": (
        {"settings": Settings(mode="observe", min_batch_tokens=100), "after_P": np.array([1.8, 1.6])},
        "worth_it",
        {"mode": "active"},
    ),
    "observe, balanced": (
        {"settings": Settings(mode="observe"), "before_P": np.array([1.1, 1.1])},
        "not_worth_it",
        {},
    ),
    "observe, small batches": ({"settings": Settings(mode="observe", min_batch_tokens=9999)}, "not_worth_it", {}),
    "shadow, predicted": (
        {"settings": Settings(mode="shadow"), "cost_model": cost_model("h200"), "predicted_gain_s": 20.0},
        "worth_it",
        {"mode": "active"},
    ),
    "shadow, no gain": (
        {"settings": Settings(mode="shadow"), "cost_model": cost_model("h200"), "predicted_gain_s": 0.1},
        "not_worth_it",
        {},
    ),
    "off": ({"settings": Settings(mode="off")}, "not_enough_evidence", {"mode": "observe"}),
    "few steps": ({"layer_steps_P": np.array([10.0, 10.0])}, "not_enough_evidence", {}),
    "just started": ({"window_s": 5.0}, "not_enough_evidence", {}),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_advice(name: str) -> None:
    changes, verdict, patch = VERDICTS[name]
    found = advise(evidence(**changes))
    assert (found.outcome, found.patch) == (verdict, patch), found.reason
    assert found.reason and found.inputs["layer_steps"] == float(evidence(**changes).layer_steps_P.sum())


def braked(brake: Brake, now_s: float, evidence: Evidence) -> tuple[Any, Brake]:
    """One decision to turn lending down, and the brake after it."""
    decision = decide_brake(evidence, brake, now_s)
    assert decision.outcome == "brake" and decision.for_s is not None and "slower" in decision.reason, decision
    return decision, Brake(brake.strikes + 1, now_s, now_s + decision.for_s)


def test_the_brake_first_raises_the_threshold_then_observes_ever_longer() -> None:
    slow, brake, now_s = evidence(worth_NPW=worth(-0.1)), Brake(), NOW_S
    durations, patches = [], []
    for _ in range(12):
        decision, brake = braked(brake, now_s, slow)
        durations.append(decision.for_s)
        patches.append(decision.patch)
        is_mild = decision.patch == {"imbalance_threshold": 1.45}
        halfway = slow if is_mild else evidence(settings=Settings(mode="observe"), worth_NPW=worth(0, 0))
        assert decide_brake(halfway, brake, now_s + decision.for_s / 2).outcome == "braking"
        now_s += decision.for_s
    assert patches[0] == {"imbalance_threshold": 1.45} and patches[1:] == [{"mode": "observe"}] * 11
    assert durations[:3] == [BRAKE_S, 2 * BRAKE_S, 4 * BRAKE_S]
    assert durations == sorted(durations) and durations[-1] == LONGEST_BRAKE_S


SURE = st.floats(0.05, 0.5)  # beyond the noise of `worth` here


@given_settings(max_examples=30)
@given(SURE, SURE, st.sampled_from([0, 1]), st.integers(0, 20))
def test_the_brake_spares_the_phase_that_does_not_lose(loss: float, gain: float, losing: int, seed: int) -> None:
    """Whatever both phases come to together."""
    windows = worth(-loss, noise=0.01, seed=seed, phase=losing) + worth(gain, noise=0.01, seed=seed, phase=1 - losing)
    brake, now_s = Brake(), NOW_S
    for strike in range(3):
        decision, brake = braked(brake, now_s, evidence(worth_NPW=windows))
        assert decision.patch == {"phases": STEP_PHASES[1 - losing]} and decision.for_s == BRAKE_S * 2**strike
        assert f"in {STEP_PHASES[losing]}" in decision.reason
        now_s += decision.for_s
    advice = advise(evidence(worth_NPW=windows))
    assert (advice.outcome, advice.patch) == ("worth_it", {"phases": STEP_PHASES[1 - losing]})


@given_settings(max_examples=30)
@given(SURE, SURE, st.integers(0, 20))
def test_where_both_phases_lose_both_are_turned_down(prefill: float, decode: float, seed: int) -> None:
    windows = worth(-prefill, noise=0.01, seed=seed) + worth(-decode, noise=0.01, seed=seed, phase=1)
    first, brake = braked(Brake(), NOW_S, evidence(worth_NPW=windows))
    second, _ = braked(brake, NOW_S + BRAKE_S, evidence(worth_NPW=windows))
    assert first.patch == {"imbalance_threshold": 1.45} and second.patch == {"mode": "observe"}


def test_the_phase_that_was_spared_is_judged_again_while_the_brake_is_long() -> None:
    brake = Brake(5, NOW_S, NOW_S + 32 * BRAKE_S)
    slow = evidence(settings=Settings(phases="decode"), worth_NPW=worth(-0.1, phase=1))
    assert decide_brake(slow, brake, NOW_S + BRAKE_S / 2).outcome == "braking"
    assert decide_brake(evidence(), brake, NOW_S + 2 * BRAKE_S).outcome == "braking"
    again = decide_brake(slow, brake, NOW_S + BRAKE_S)
    assert again.patch == {"mode": "observe"} and again.for_s == 32 * BRAKE_S


def test_the_brake_forgets_after_a_sure_gain_long_enough() -> None:
    brake = Brake(3, NOW_S - FORGIVE_AFTER_S - 100, NOW_S - FORGIVE_AFTER_S - 1)
    assert decide_brake(evidence(), brake, NOW_S).outcome == "forgiven"
    assert decide_brake(evidence(), Brake(3, NOW_S - 200, NOW_S - 100), NOW_S).outcome == "nothing"
    assert decide_brake(evidence(worth_NPW=worth(0.001, noise=0.3)), brake, NOW_S).outcome == "nothing"


@given(st.floats(-0.5, 0.5), st.floats(0.0, 0.5), st.integers(0, 20), st.sampled_from(["off", "observe", "shadow"]))
def test_the_brake_acts_on_sure_losses_of_active_engines_only(
    gain_ratio: float, noise: float, seed: int, mode: str
) -> None:
    windows = worth(gain_ratio, noise=noise, seed=seed)
    gain = measured_gain(windows)
    found = decide_brake(evidence(worth_NPW=windows), Brake(), NOW_S)
    assert (found.outcome == "brake") == (gain is not None and gain.ratio + 2 * gain.error < 0)
    idle = decide_brake(evidence(worth_NPW=windows, settings=Settings(mode=mode)), Brake(), NOW_S)
    assert idle.outcome == "nothing" and not idle.patch


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1.0, 20.0), st.floats(1.0, 3.0), st.integers(1, 65536))
def test_proposed_thresholds_stay_in_range_and_near(
    lend_s: float, compute_s: float, before: float, threshold: float, chunk: int
) -> None:
    settings = Settings(
        imbalance_threshold=threshold, min_chunk_tokens=chunk, auto_tune_min_threshold=1.2, auto_tune_max_threshold=2.0
    )
    seconds = {"plan": 0.1, "lend": lend_s, "compute": compute_s}
    found = decide_thresholds(
        evidence(settings=settings, phase_seconds=seconds, before_P=np.array([before, before])), Settings()
    )
    for key, value in found.patch.items():
        Settings().changed({key: value})  # valid
        now = getattr(settings, key)
        if key == "imbalance_threshold":
            assert 1.2 <= value <= 2.0
            is_stepping_in = not 1.2 <= now <= 2.0
            assert is_stepping_in or (value - 1) / max(now - 1, 0.05) <= STEP_FACTOR + 0.02
        else:
            assert isinstance(value, int) and value >= 1


def test_dear_lends_raise_thresholds_and_cheap_ones_lower_them() -> None:
    dear = decide_thresholds(
        evidence(phase_seconds={"plan": 1.0, "lend": 200.0, "compute": 50.0}), Settings(min_batch_tokens=100)
    )
    cheap = decide_thresholds(
        evidence(
            phase_seconds={"plan": 0.001, "lend": 0.01, "compute": 50.0},
            settings=Settings(imbalance_threshold=2.0, min_batch_tokens=100),
        ),
        Settings(min_batch_tokens=100),
    )
    assert dear.outcome == cheap.outcome == "propose"
    assert dear.patch["imbalance_threshold"] > 1.3 and cheap.patch["imbalance_threshold"] < 2.0
    assert dear.patch["min_chunk_tokens"] > 1024 > cheap.patch["min_chunk_tokens"]


def test_without_lends_nothing_is_proposed() -> None:
    found = decide_thresholds(evidence(lends=0.0, decisions={}), Settings())
    assert found.outcome == "not_enough_evidence" and not found.patch


NO_LENDS: dict[str, Any] = {"lends": 0.0, "decisions": {}, "phase_seconds": {}, "worth_NPW": worth(0)[:0]}


def modelled(link_bytes_per_s: float = 1e9, **changes: Any) -> Evidence:
    """An engine that has not lent, whose experts of 1 MiB take 1 ms up to 100 pairs, then 10 us a pair."""
    model = CostModel(
        name="mine",
        source="a test",
        expert_bytes=1 << 20,
        gemm_curve=((1, 1e-3), (100, 1e-3), (1000, 1e-2)),
        gemm_launch_s=0.0,
        node_link=Link(0.0, link_bytes_per_s),
        network_link=Link(0.0, link_bytes_per_s / 100),
        plan_s=1e-3,
    )
    return evidence(cost_model=model, **NO_LENDS, **changes)


def test_the_cost_model_gives_thresholds_before_anything_is_lent() -> None:
    """A lend of 1.05 ms pays, 1.5 times, from 158 pairs on, and with its plan of 1 ms from 308 on; batches here have
    2000 x 4 / 8 = 1000 pairs a rank and an imbalance of 1.7."""
    start = Settings(min_batch_tokens=400, min_chunk_tokens=128, imbalance_threshold=1.5)
    found = decide_thresholds(modelled(settings=start), start)
    assert (found.inputs["chunk_pairs"], found.inputs["surplus_pairs"]) == (166.0, 332.0)
    assert found.patch == {
        "imbalance_threshold": 1.332,
        "min_chunk_tokens": 166,
        "min_batch_tokens": 800,
    }
    assert "by the cost model mine a lend takes 1.05 ms and pays from 166 pairs on" in found.reason


@given(st.floats(1e6, 1e13), st.floats(1.1, 10.0), st.floats(1.05, 3.0))
def test_slower_links_never_lower_a_threshold(bytes_per_s: float, times: float, threshold: float) -> None:
    start = Settings(imbalance_threshold=threshold, auto_tune_min_threshold=1.0, auto_tune_max_threshold=100.0)
    fast, slow = (
        decide_thresholds(modelled(link_bytes_per_s=rate, settings=start), start)
        for rate in (bytes_per_s, bytes_per_s / times)
    )
    if slow.outcome == "not_enough_evidence":
        assert "no lend of any size would pay" in slow.reason
        return
    for key in ("imbalance_threshold", "min_chunk_tokens", "min_batch_tokens"):
        assert fast.patch.get(key, getattr(start, key)) <= slow.patch.get(key, getattr(start, key))


def test_an_engine_over_several_nodes_is_reckoned_by_its_network() -> None:
    near, far, within = (
        decide_thresholds(modelled(is_one_node=is_one_node, settings=Settings(lend_scope=scope)), Settings())
        for is_one_node, scope in ((True, "any"), (False, "any"), (False, "node"))
    )
    assert near.inputs["chunk_pairs"] == within.inputs["chunk_pairs"] < far.inputs["chunk_pairs"]


def test_without_a_batch_the_cost_model_proposes_nothing() -> None:
    idle = {"tokens_P": np.zeros(2), "layer_steps_P": np.zeros(2)}
    assert decide_thresholds(modelled(**idle), Settings()).outcome == "not_enough_evidence"


# Placement.

LAYERS, EXPERTS, RANKS = 3, 16, 4
HOMES_LE = np.tile(np.repeat(np.arange(RANKS), EXPERTS // RANKS), (LAYERS, 1))


def ground(windows: list[np.ndarray[Any, Any]], **changes: Any) -> Ground:
    forecast = Forecast.start(LAYERS, EXPERTS)
    for loads_LE in windows:
        forecast = forecast.seen(loads_LE)
    settings = changes.pop("settings", Settings(replicas="apply"))
    of_evidence = {"num_layers": LAYERS, "ep_size": RANKS, "settings": settings, **changes.pop("of_evidence", {})}
    values: dict[str, Any] = {
        "forecast": forecast,
        "home_rank_LE": HOMES_LE,
        "present": (),
        "room_R": (LAYERS,) * RANKS,
        "bytes_per_expert": 1 << 20,
        "bytes_per_s": 64 << 20,
        "lends_L": np.full(LAYERS, 1000.0),
        "evidence": evidence(**of_evidence),
        **changes,
    }
    return Ground(**values)


def hot_windows(count: int, hot: Any, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Windows in which the expert hot(number) has half of the pairs of every layer."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        share_E = np.full(EXPERTS, 0.5 / (EXPERTS - 1))
        share_E[hot(number)] = 0.5
        found.append(rng.multinomial(100_000, share_E, size=LAYERS))
    return found


def decide(of: Ground, is_filling: bool = False) -> Any:
    return decide_placement(of, is_filling=is_filling)


def test_an_expert_that_stays_hot_gets_replicas() -> None:
    decision, found = decide(ground(hot_windows(10, lambda number: 3)))
    assert decision.outcome == "order" and found is not None and found.is_worth_it, decision.reason
    assert {copy.expert for copy in found.plan.added} == {3}
    assert found.after is not None and found.before is not None and found.after < 1.1 < 1.9 < found.before
    assert found.lend_cut_ratio > 0.9 and found.saving_s > 2 * found.cost_s > 0
    assert decision.expected_gain_ratio > 0 and decision.inputs["windows"] == 10
    assert decision.inputs["changed_windows_ago"] is None


def test_what_changed_at_once_is_answered_from_the_windows_since() -> None:
    windows = hot_windows(10, lambda number: 3) + hot_windows(4, lambda number: 5)
    decision, found = decide(ground(windows))
    assert decision.outcome == "order" and found is not None, decision.reason
    assert {copy.expert for copy in found.plan.added} == {5}
    assert (decision.inputs["windows"], decision.inputs["changed_windows_ago"]) == (14, 4)


def test_experts_that_are_hot_by_turns_move_nothing() -> None:
    decision, _ = decide(ground(hot_windows(20, lambda number: number % EXPERTS)))
    assert decision.outcome == "nothing", decision.reason


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        ("suggest", {"settings": Settings(replicas="suggest")}),
        ("suggest", {"settings": Settings(replicas="apply", mode="observe")}),
        ("no_room", {"room_R": (0,) * RANKS}),
        ("idle", {"of_evidence": {"layer_steps_P": np.zeros(2)}}),
        ("not_worth_it", {"bytes_per_expert": 1 << 40, "bytes_per_s": 1 << 40}),
        (
            "not_worth_it",
            {"of_evidence": {"phase_seconds": {"compute": 1.0}, "after_P": np.array([1.0, 1.0])}},
        ),
    ],
)
def test_what_keeps_replicas_from_being_ordered(outcome: str, changes: dict[str, Any]) -> None:
    decision, _ = decide(ground(hot_windows(10, lambda number: 3), **changes))
    assert decision.outcome == outcome, decision.reason


def test_two_windows_are_not_believed() -> None:
    assert decide(ground(hot_windows(2, lambda number: 3)))[0].outcome == "nothing"


def test_changes_wait_for_the_one_before() -> None:
    windows, enough_s = hot_windows(10, lambda number: 3), FEWEST_ROUNDS * Settings().decide_every_s
    assert decide(ground(windows, of_evidence={"window_s": 0.9 * enough_s}))[0].outcome == "cooling_down"
    assert decide(ground(windows, of_evidence={"window_s": enough_s}))[0].outcome == "order"
    assert decide(ground(windows), is_filling=True)[0].outcome == "filling"


def test_replicas_that_lost_their_room_go_at_once() -> None:
    present = tuple(Replica(layer, 3, 1) for layer in range(LAYERS))
    decision, found = decide(
        ground(hot_windows(10, lambda number: 3), present=present, room_R=(3, 1, 3, 3), of_evidence={"window_s": 0.0}),
        is_filling=True,
    )
    assert decision.outcome == "order" and found is not None
    assert sum(copy.rank == 1 for copy in found.plan.replicas) <= 1


def test_what_is_there_already_is_kept() -> None:
    hot = ground(hot_windows(10, lambda number: 3))
    _, found = decide(hot)
    assert found is not None
    again, _ = decide(ground(hot_windows(10, lambda number: 3, seed=1), present=found.plan.replicas))
    assert again.outcome in ("nothing", "not_worth_it"), again.reason


@pytest.mark.parametrize("seed", range(6))
def test_a_placement_settles_under_one_load(seed: int) -> None:
    """Steps stay more uneven than the mean of many, and are lent for: no reason to move a few copies more."""
    rng = np.random.default_rng(seed)
    share_LE = rng.dirichlet(np.full(EXPERTS, 0.7), size=LAYERS)
    by_chance = {"before_P": np.array([1.3, 1.8]), "after_P": np.array([1.2, 1.8])}
    windows: list[np.ndarray[Any, Any]] = []
    present: tuple[Replica, ...] = ()
    taken_off = []
    for _ in range(24):
        shares_LE = share_LE * rng.uniform(0.9, 1.1, share_LE.shape)
        shares_LE /= shares_LE.sum(axis=1, keepdims=True)
        windows.append(np.stack([rng.multinomial(20_000, share_E) for share_E in shares_LE]))
        of_evidence = by_chance if present else {}
        decision, found = decide(ground(windows, present=present, room_R=(6,) * RANKS, of_evidence=of_evidence))
        if decision.outcome == "order":
            assert found is not None and found.before is not None and found.after is not None
            present = found.plan.replicas
            taken_off.append(found.before - found.after)
    assert 1 <= len(taken_off) <= 2
    assert all(less > 0.05 for less in taken_off), taken_off


def test_slow_links_get_fewer_copies_at_a_time() -> None:
    slow = ground(hot_windows(10, lambda number: 3), bytes_per_s=1 << 14, bytes_per_expert=1 << 20)
    _, found = decide(slow)
    assert found is not None and len(found.plan.added) <= 2 * RANKS


def test_room_is_what_slots_and_memory_leave() -> None:
    GiB = 1 << 30
    assert room(4, [0, 0, 3, 0], [10 * GiB, GiB, 0, 0], [80 * GiB, 80 * GiB, 80 * GiB, 0], GiB) == (4, 0, 3, 4)


FITTING = (0, 0, 1)
MISFITS = {
    "unknown_layer": [(3, 0, 1)],
    "unknown_expert": [(0, 16, 1)],
    "unknown_rank": [(0, 0, -1)],
    "home_rank": [(0, 0, 0)],
    "twice": [FITTING, FITTING],
    "no_room": [(0, expert, 1) for expert in range(4)],
}


@pytest.mark.parametrize("rule", MISFITS)
def test_replicas_that_do_not_fit_are_refused_by_name(rule: str) -> None:
    assert refusal([FITTING], HOMES_LE, (3,) * RANKS) is None
    assert str(refusal(MISFITS[rule], HOMES_LE, (3,) * RANKS)).startswith(f"{rule}: ")


# Rings.


@given(st.lists(st.floats(0.01, 30.0), min_size=1, max_size=60), st.sampled_from([1.0, 10.0]), st.integers(2, 9))
def test_a_ring_keeps_the_first_row_of_each_step(gaps: list[float], step_s: float, capacity: int) -> None:
    times = np.cumsum(gaps)
    ring, kept = Ring(step_s, capacity, 1), []
    for time_s in times:
        if ring.wants(time_s):
            ring.put(time_s, np.array([time_s]))
            kept.append(time_s)
    steps = [time_s // step_s for time_s in kept]
    assert steps == sorted(set(steps)) and set(steps) == {time_s // step_s for time_s in times}
    assert ring.times.tolist() == kept[-capacity:] == ring.rows[:, 0].tolist()
    assert ring.reaches(kept[0]) == (len(kept) <= capacity)
    for at_s in (times[0] - 1.0, float(np.mean(times)), times[-1] + 1.0):
        earlier = [time_s for time_s in kept[-capacity:] if time_s <= at_s]
        assert ring.at(at_s)[0] == (earlier[-1] if earlier else kept[-capacity:][0])


@given(
    st.lists(
        st.tuples(st.floats(0.01, 3.0), st.sampled_from([0, 1, 200, 60_000, 1 << 20, (1 << 32) - 1])), max_size=40
    ),
    st.integers(2, 9),
)
def test_increments_are_a_ring_in_fewer_bytes(steps: list[tuple[float, int]], capacity: int) -> None:
    """Of counts modulo 2^32, also where they pass it."""
    ring, increments = Ring(1.0, capacity, 2, np.uint32), Increments(1.0, capacity, 2, np.uint32)
    time_s, total = 0.0, 0
    for gap_s, added in steps:
        time_s, total = time_s + gap_s, total + added
        assert ring.wants(time_s) == increments.wants(time_s)
        if ring.wants(time_s):
            for each in (ring, increments):
                each.put(time_s, np.array([total, 7], dtype=np.uint64).astype(np.uint32))
    assert len(ring) == len(increments) and ring.reaches(time_s - 5) == increments.reaches(time_s - 5)
    for at_s in np.linspace(-1.0, time_s + 1.0, 12) if len(ring) else ():
        assert ring.at(at_s)[0] == increments.at(at_s)[0]
        assert ring.at(at_s)[1].tolist() == increments.at(at_s)[1].tolist()
        assert ring.reaches(at_s) == increments.reaches(at_s)
    if max((added for _, added in steps), default=0) < 1 << 8 and len(increments) > 1:
        assert {added.dtype for added in list(increments._added)[1:]} <= {np.dtype(np.uint8), np.dtype(np.uint16)}


def test_thresholds_stay_within_what_a_setting_may_be() -> None:
    start = Settings(min_chunk_tokens=40_000, min_batch_tokens=200_000)
    dear = {"plan": 1.0, "lend": 20_000.0, "compute": 50.0}
    decision = decide_thresholds(evidence(settings=start, phase_seconds=dear), start)
    assert decision.patch["min_chunk_tokens"] == 65_536
    start.changed(decision.patch)
