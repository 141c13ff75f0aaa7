"""What settings leave to plain EP, and the load window's sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llep.config import Settings
from llep.cost import cost_model
from llep.loads import home_loads, skewed_counts
from llep.messages import IMBALANCE_BUCKETS, MOST_PLANS, PlanSample
from llep.moe.layer import PhaseTimes
from llep.moe.verify import is_probe, is_sampled
from llep.moe.window import PLANS_PER_REPORT, UNMEASURED_STEPS, LayerStep, LoadWindow
from llep.placement import Placement, ranks_per_node
from llep.plan import Decision, Plan, check_plan
from llep.planning.home import plan_home
from llep.planning.policy import Step, decide, may_plan, needs_counts

PREFILL = Step("prefill", 4096)


@pytest.mark.parametrize(
    ("settings", "step", "layer", "reason"),
    [
        (Settings(), PREFILL, 0, None),
        (Settings(mode="off"), PREFILL, 0, Decision.OFF),
        (Settings(mode="observe"), PREFILL, 0, Decision.OFF),
        (Settings(mode="shadow"), PREFILL, 0, None),
        (Settings(phases="decode"), PREFILL, 0, Decision.OFF),
        (Settings(phases="decode"), Step("decode", 4096), 0, None),
        (Settings(layers="2-4,7"), PREFILL, 5, Decision.OFF),
        (Settings(layers="2-4,7"), PREFILL, 4, None),
        (Settings(min_batch_tokens=4097), PREFILL, 0, Decision.SMALL_BATCH),
        (Settings(min_batch_tokens=4096), PREFILL, 0, None),
    ],
)
def test_why_a_layer_is_left_alone(settings: Settings, step: Step, layer: int, reason: Decision | None) -> None:
    assert may_plan(settings, step, layer) is reason


def test_a_plan_that_does_not_pay_is_not_taken() -> None:
    counts = skewed_counts(2, 8, 300, hot_experts=[0, 1], hot_share=0.9, seed=0)
    placement = Placement.linear(8, 2, slots_per_rank=4)
    settings = Settings(min_chunk_tokens=1)
    asked = (settings, PREFILL, 0, counts, placement, 50_000_000)
    assert decide(*asked).decision is Decision.LEND
    assert decide(*asked, cost_model=cost_model("h200")).decision is Decision.NO_GAIN


REPLICATED = Placement(Placement.linear(8, 2, 0).home_rank, (4, 4), replicas=((0, 1), (1, 1)))


def test_replicas_are_not_charged_for_a_plan_that_is_made_in_any_case() -> None:
    """50 us of planning are more than what copies save in a decode step; but they have been spent by then."""
    counts = skewed_counts(2, 8, 900, hot_experts=[0, 1], hot_share=0.9, seed=0)
    step = Step("decode", 225)
    model = cost_model("h200")
    asked = (Settings(min_batch_tokens=2048), step, 0, counts, REPLICATED, 50_000_000)
    found = decide(*asked, cost_model=model)
    assert found.decision is Decision.REPLICA
    assert 0 < found.predicted_gain_s < model.plan_s


@pytest.mark.parametrize(
    ("settings", "step", "decision"),
    [
        (Settings(), Step("prefill", 100), Decision.REPLICA),
        (Settings(phases="prefill"), Step("decode", 4096), Decision.REPLICA),
        (Settings(mode="shadow"), Step("prefill", 100), Decision.REPLICA),
        (Settings(planner="least_loaded"), Step("prefill", 100), Decision.REPLICA),
        (Settings(planner="home"), Step("prefill", 100), Decision.SMALL_BATCH),
        (Settings(mode="off"), Step("prefill", 100), Decision.OFF),
        (Settings(mode="observe"), Step("prefill", 100), Decision.OFF),
        (Settings(layers="1"), Step("prefill", 100), Decision.OFF),
        (Settings(imbalance_threshold=3), Step("prefill", 100), Decision.SMALL_BATCH),
    ],
)
def test_where_nothing_is_lent_only_the_placement_acts(settings: Settings, step: Step, decision: Decision) -> None:
    counts = skewed_counts(2, 8, 100, hot_experts=[0, 1, 2], hot_share=0.9, seed=0)
    plan = decide(settings, step, 0, counts, REPLICATED, 100)
    assert plan.decision is decision and not plan.lends
    if decision is Decision.REPLICA:
        check_plan(plan, counts.sum(axis=0).tolist())
        assert needs_counts(settings, step, 0, REPLICATED)
    plain = Placement.linear(8, 2, 4)
    assert not needs_counts(settings, step, 0, plain) and decide(settings, step, 0, counts, plain, 100).lends == ()


def test_lends_stay_within_a_node_if_told() -> None:
    counts = skewed_counts(4, 8, 4000, hot_experts=[0, 1], hot_share=0.9, seed=0)
    placement = Placement.linear(8, 4, slots_per_rank=2)
    for scope, allowed in (("any", {1, 2, 3}), ("node", {1})):
        settings = Settings(min_chunk_tokens=1, lend_scope=scope)
        plan = decide(settings, PREFILL, 0, counts, placement, 100, ranks_per_node=2)
        assert {lend.dst_rank for lend in plan.lends} == allowed


@pytest.mark.parametrize(
    ("machines", "expected"),
    [([5], None), ([5, 5, 5], None), ([5, 5, 7, 7], 2), ([5, 7], 1), ([5, 7, 5, 7], None), ([5, 5, 7], None)],
)
def test_ranks_per_node_where_machines_have_as_many(machines: list[int], expected: int | None) -> None:
    assert ranks_per_node(machines) == expected


def window_of(placement: Placement, num_layers: int, ranks_per_node: int | None = None) -> LoadWindow:
    homes = np.tile(placement.home_rank, (num_layers, 1))
    return LoadWindow(homes, placement.ep_size, top_k=2, bytes_per_lend=100, ranks_per_node=ranks_per_node)


def layer_step(counts: np.ndarray, planned: Plan, **changes: Any) -> LayerStep:
    values = {
        "step": 1,
        "phase": "prefill",
        "layer": 0,
        "home_loads": home_loads(counts.sum(axis=0), planned.placement.home_rank, planned.placement.ep_size),
        "is_moved": True,
        "is_verified": False,
        "times": PhaseTimes({"compute": 0.5}),
        "seconds": 1.0,
    }
    return LayerStep(counts_RE=counts, planned=planned, **{**values, **changes})


def skewed(seed: int, ep_size: int = 2, hot_experts: Sequence[int] = (0, 1)) -> np.ndarray:
    return skewed_counts(ep_size, 8, 2000, hot_experts=list(hot_experts), hot_share=0.9, seed=seed)


def test_the_window_adds_up_by_phase() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = window_of(placement, num_layers=2)
    settings = Settings(min_chunk_tokens=1, planner="least_loaded")
    for step in range(5):
        counts = skewed(step)
        plan = decide(settings, PREFILL, 0, counts, placement, 100)
        phase = "decode" if step == 4 else "prefill"
        window.record(layer_step(counts, plan, step=step, phase=phase, layer=step % 2), slots_used=1)
    loads = window.group_loads()
    pairs_PL = 2 * loads.tokens_PL.numpy()
    assert pairs_PL.tolist() == [[8000, 8000], [4000, 0]]
    for values in (loads.routed_PLE, loads.routed_PLR, loads.computed_PLR):
        assert values.numpy().sum(axis=2).tolist() == pairs_PL.tolist()
    assert loads.layer_steps_PL.numpy().tolist() == [[2, 2], [1, 0]]
    assert loads.decisions == {"prefill": {"lend": 4}, "decode": {"lend": 1}}
    lends_PL = loads.lends_PL.numpy()
    assert lends_PL[0].min() > 0 and lends_PL[1, 0] > 0 and lends_PL[1, 1] == 0
    for lends_PRK in (loads.lends_in_PRK.numpy(), loads.lends_out_PRK.numpy()):
        assert lends_PRK.sum(axis=(1, 2)).tolist() == lends_PL.sum(axis=1).tolist()
        assert lends_PRK[:, :, 1].sum() == 0
    spilled_in_PR, spilled_out_PR = loads.spilled_in_PR.numpy(), loads.spilled_out_PR.numpy()
    assert spilled_in_PR[:, 1].tolist() == spilled_out_PR[:, 0].tolist() and spilled_in_PR[:, 1].min() > 0
    routed_PR, computed_PR = (each.numpy().sum(axis=1) for each in (loads.routed_PLR, loads.computed_PLR))
    assert (routed_PR[:, 0] - spilled_out_PR[:, 0]).tolist() == computed_PR[:, 0].tolist()
    before, after = loads.imbalance_histograms
    assert sum(before.counts) == sum(after.counts) == 5 and len(before.counts) == len(IMBALANCE_BUCKETS) + 1
    assert before.sum > 1.6 * 5 and after.sum < 1.05 * 5
    balanced_S = loads.balancedness_sum_PLS.numpy().sum(axis=(0, 1)) / 5
    assert balanced_S[0] < 0.65 and 0.95 < balanced_S[1] <= 1
    assert window.layer_seconds == {"prefill": 4.0, "decode": 1.0}
    assert loads.home_rank_LE.numpy().tolist() == [list(placement.home_rank)] * 2


def test_lends_are_counted_by_the_link_that_they_took() -> None:
    placement = Placement.linear(8, 4, slots_per_rank=2)
    window = window_of(placement, num_layers=1, ranks_per_node=2)
    counts = skewed(0, ep_size=4)
    plan = decide(Settings(min_chunk_tokens=1), PREFILL, 0, counts, placement, 100, ranks_per_node=2)
    window.record(layer_step(counts, plan))
    loads = window.group_loads()
    in_K = loads.lends_in_PRK.numpy().sum(axis=(0, 1))
    assert in_K.tolist() == loads.lends_out_PRK.numpy().sum(axis=(0, 1)).tolist() and in_K.min() > 0
    assert in_K.sum() == len(plan.lends)
    assert loads.lends_in_PRK.numpy()[:, 1, 1].sum() == 0  # rank 1 is in the hot rank's node


def test_what_replicas_compute_is_spilled_but_not_lent() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=0)
    placement = Placement(placement.home_rank, (0, 0), replicas=((0, 1), (1, 1)))
    window = window_of(placement, num_layers=1)
    counts = skewed(0)
    plan = decide(Settings(min_chunk_tokens=1), PREFILL, 0, counts, placement, 100)
    window.record(layer_step(counts, plan))
    loads = window.group_loads()
    assert loads.decisions_in_both == {"replica": 1} and loads.lends_PL.numpy().sum() == 0
    moved = loads.routed_PLR.numpy()[0, 0, 0] - loads.computed_PLR.numpy()[0, 0, 0]
    assert loads.spilled_in_PR.numpy()[0, 1] == loads.spilled_out_PR.numpy()[0, 0] == moved > 0


def test_shadow_counts_what_it_would_do_but_computes_at_home() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = window_of(placement, num_layers=1)
    counts = skewed(0, hot_experts=[0])
    plan = decide(Settings(mode="shadow", min_chunk_tokens=1), PREFILL, 0, counts, placement, 100)
    window.record(layer_step(counts, plan, is_moved=False))
    loads = window.group_loads()
    assert loads.computed_PLR.numpy().tolist() == loads.routed_PLR.numpy().tolist()
    assert loads.lends_PL.numpy().sum() == 0 and loads.decisions_in_both == {"lend": 1}
    assert loads.imbalance_histograms[1].sum < loads.imbalance_histograms[0].sum
    assert window.worth()["prefill"].lent_steps == 0


def test_what_lending_is_worth_is_measured_against_probes() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = window_of(placement, num_layers=1)
    settings = Settings(min_chunk_tokens=1)
    for step in range(1, 101):
        counts = skewed(step)
        plan = decide(settings, PREFILL, 0, counts, placement, 100, is_probe=step % 10 == 0)
        pairs = max(home_loads(counts.sum(axis=0), placement.home_rank, 2))
        seconds = 1e-3 * pairs * (1.0 if plan.decision is Decision.PROBE else 0.6)
        window.record(layer_step(counts, plan, step=step, seconds=seconds, is_verified=step % 10 == 5))
    worth = window.worth()["prefill"]
    assert (worth.probed_steps, worth.lent_steps) == (10 - UNMEASURED_STEPS, 80 - UNMEASURED_STEPS)
    assert worth.gain_s == pytest.approx(1e-3 * worth.lent_pairs * 0.4)
    assert window.group_loads().decisions["prefill"] == {"lend": 90, "probe": 10}
    assert window.worth()["decode"].gain_s is None


def test_a_balanced_batch_is_no_probe() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    counts = np.full((2, 8), 1000)
    plan = decide(Settings(), PREFILL, 0, counts, placement, 100, is_probe=True)
    assert plan.decision is Decision.BALANCED


@pytest.mark.parametrize(("ratio", "verified"), [(0.01, 0.0), (0.1, 0.0), (0.5, 0.0), (0.1, 0.5), (0.0, 0.0)])
def test_probes_are_the_share_asked_for_and_never_verified(ratio: float, verified: float) -> None:
    steps = range(1, 20_001)
    probes = [step for step in steps if is_probe(step, ratio, verified)]
    assert len(probes) == pytest.approx(len(steps) * ratio * (1 - verified), rel=0.05)
    assert not any(is_sampled(step, verified) for step in probes)
    for period in (2, 3, 10, 100):  # of a workload: no phase of it is left out
        assert not probes or verified or len({step % period for step in probes}) == period


def test_plan_samples_are_a_few_per_report_over_all_layers() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = window_of(placement, num_layers=10)
    seen: dict[int, PlanSample] = {}
    for report in range(20):
        for layer in range(10):
            counts = skewed(report * 10 + layer)
            plan = decide(Settings(min_chunk_tokens=1), PREFILL, 0, counts, placement, 100)
            window.record(layer_step(counts, plan, step=report, layer=layer))
        plans = window.group_loads().plans
        assert len(plans) <= MOST_PLANS and len([p for p in plans if p.id not in seen]) == PLANS_PER_REPORT
        seen |= {plan.id: plan for plan in plans}
    assert sorted(seen) == list(range(1, 20 * PLANS_PER_REPORT + 1))
    assert len({plan.layer for plan in seen.values()}) == 10
    for plan in seen.values():
        assert sum(plan.routed_R) == sum(plan.computed_R) == 2 * plan.tokens == 4000
        assert plan.routed_R[0] - plan.computed_R[0] == sum(tokens for _, _, _, tokens in plan.lends)
    assert window.group_loads().plans[-1].id == 20 * PLANS_PER_REPORT, "nothing new"


def test_an_empty_batch_is_balanced() -> None:
    placement = Placement.linear(4, 2, slots_per_rank=1)
    plan = decide(Settings(min_batch_tokens=0), Step("decode", 0), 0, np.zeros((2, 4), np.int64), placement, 1)
    assert plan.rank_loads == [0, 0] and plan.decision is Decision.BALANCED
    assert plan_home([0, 0, 0, 0], placement).segments == ()
