"""What settings leave to plain EP, and the load window's sums."""

from __future__ import annotations

import numpy as np
import pytest

from llep.config import Settings
from llep.cost import cost_model
from llep.loads import home_loads, skewed_counts
from llep.messages import IMBALANCE_BUCKETS
from llep.moe.layer import PhaseTimes
from llep.moe.window import LoadWindow
from llep.placement import Placement, ranks_per_node
from llep.plan import Decision
from llep.planning.home import plan_home
from llep.planning.policy import Step, decide, may_plan

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


def test_the_window_adds_up() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = LoadWindow(num_layers=2, ep_size=2, num_experts=8, top_k=2, bytes_per_lend=100)
    settings = Settings(min_chunk_tokens=1, planner="least_loaded")
    for step in range(5):
        counts = skewed_counts(2, 8, 2000, hot_experts=[0, 1], hot_share=0.9, seed=step)
        plan = decide(settings, PREFILL, 0, counts, placement, 100)
        window.record(step % 2, counts, plan, home_loads(counts.sum(axis=0), placement.home_rank, 2), True, 1)
        window.record_times(PhaseTimes({"compute": 0.5}), 1.0)
    loads = window.group_loads()
    assert loads.routed_LE.numpy().sum(axis=1).tolist() == (2 * loads.tokens_L.numpy()).tolist() == [12000, 8000]
    assert loads.routed_LR.numpy().sum(axis=1).tolist() == loads.computed_LR.numpy().sum(axis=1).tolist()
    assert loads.decisions == {"lend": 5}
    assert loads.lends_in_R.numpy().sum() == loads.lends_out_R.numpy().sum() > 0
    assert loads.spilled_in_R.numpy()[1] == loads.spilled_out_R.numpy()[0]
    assert (
        loads.routed_LR.numpy().sum(axis=0)[0] - loads.spilled_out_R.numpy()[0]
        == loads.computed_LR.numpy().sum(axis=0)[0]
    )
    before, after = loads.imbalance_histograms
    assert sum(before.counts) == sum(after.counts) == 5 and len(before.counts) == len(IMBALANCE_BUCKETS) + 1
    assert before.sum > 1.6 * 5 and after.sum < 1.05 * 5
    assert window.layer_seconds == 5.0


def test_shadow_counts_what_it_would_do_but_computes_at_home() -> None:
    placement = Placement.linear(8, 2, slots_per_rank=4)
    window = LoadWindow(num_layers=1, ep_size=2, num_experts=8, top_k=2, bytes_per_lend=100)
    counts = skewed_counts(2, 8, 2000, hot_experts=[0], hot_share=0.9, seed=0)
    plan = decide(Settings(mode="shadow", min_chunk_tokens=1), PREFILL, 0, counts, placement, 100)
    window.record(0, counts, plan, home_loads(counts.sum(axis=0), placement.home_rank, 2), False, 0)
    loads = window.group_loads()
    assert loads.computed_LR.numpy().tolist() == loads.routed_LR.numpy().tolist()
    assert loads.lends_in_R.numpy().sum() == 0 and loads.decisions == {"lend": 1}
    assert loads.imbalance_histograms[1].sum < loads.imbalance_histograms[0].sum


def test_an_empty_batch_is_balanced() -> None:
    placement = Placement.linear(4, 2, slots_per_rank=1)
    plan = decide(Settings(min_batch_tokens=0), Step("decode", 0), 0, np.zeros((2, 4), np.int64), placement, 1)
    assert plan.rank_loads == [0, 0] and plan.decision is Decision.BALANCED
    assert plan_home([0, 0, 0, 0], placement).segments == ()
