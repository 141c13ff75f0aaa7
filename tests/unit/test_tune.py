"""The sweep proposes what gains, keeps what holds where that gains as much, and says when there is nothing to gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llep.config import Settings
from llep.cost import cost_model
from llep.generate import Workload, generate_steps
from llep.planning import PlanOptions
from llep.shapes import SHAPES, ModelShape, StepCounts
from llep.simulate import Setup
from llep.tune import LEAST_STEPS, Sample, StepClass, Tuning, tune

RANKS = 4
SHAPE = replace(SHAPES["gpt-oss-20b"], layer_numbers=(0, 1))


def steps_of(workload: str, tokens_per_rank: int = 8192, steps: int = 12, phase: str = "prefill") -> list[StepCounts]:
    made = generate_steps(
        Workload.parse(workload),
        SHAPE,
        num_ranks=RANKS,
        tokens_per_rank=tokens_per_rank,
        steps=steps,
        seed=0,
        phase="decode" if phase == "decode" else "prefill",
    )
    return list(made)


def tuned(steps: list[StepCounts], start: Settings | None = None, costs: str | None = "h200", slots: int = 4) -> Tuning:
    options = PlanOptions(cost_model=cost_model(costs) if costs else None)
    setup = Setup(shape=SHAPE, num_ranks=RANKS, slots_per_rank=slots, options=options)
    return tune(Sample.of(SHAPE, steps), setup, start)


@pytest.mark.parametrize("costs", ["h200", None])
def test_what_holds_is_kept_where_it_gains_as_much_as_the_best(costs: str | None) -> None:
    found = tuned(steps_of("zipf:ratio=2"), costs=costs)
    assert found.verdict == "worth_it" and found.proposed.gain_ratio > 0.2
    assert found.patch == {}
    assert found.proposed.imbalance_ratio < 1.3 < found.proposed.imbalance_ratio_before


@pytest.mark.parametrize("costs", ["h200", None])
def test_what_slots_would_bring_that_nobody_reserved_is_not_promised(costs: str | None) -> None:
    found = tuned(steps_of("zipf:ratio=2"), costs=costs, slots=0)
    assert found.verdict == "not_worth_it" and found.patch == {} and found.proposed.gain_ratio == 0
    assert found.with_slots.slots_per_rank > 0 and found.with_slots.gain_ratio > 0.2
    assert f"instead of 0 it would fall by {found.with_slots.gain_ratio:.1%}" in found.slots_reason
    assert found.as_dict()["with_slots"]["gain_ratio"] == pytest.approx(found.with_slots.gain_ratio, abs=1e-5)


def test_a_patch_is_judged_with_the_slots_that_are_there() -> None:
    counts_LRE = np.zeros((2, RANKS, SHAPE.num_experts), dtype=np.int64)
    counts_LRE[:, :, : SHAPE.num_experts // RANKS] = 4096  # all on the first rank, evenly: each rank must take two
    steps, timid = [StepCounts(step, "prefill", counts_LRE) for step in range(12)], Settings(imbalance_threshold=50)
    found, roomy = tuned(steps, timid, slots=1), tuned(steps, timid, slots=8)
    assert found.patch and {case.slots_per_rank for case in (found.start, found.proposed)} == {1}
    assert found.proposed.gain_ratio < 0.98 * roomy.proposed.gain_ratio
    assert found.with_slots.slots_per_rank == roomy.with_slots.slots_per_rank > 1
    assert found.with_slots.gain_ratio == pytest.approx(roomy.with_slots.gain_ratio, rel=0.03)
    assert found.config_at_start["imbalance_threshold"] < 50


def test_fewer_slots_are_named_where_they_gain_as_much() -> None:
    found = tuned(steps_of("zipf:ratio=2"), slots=8)
    assert found.with_slots.slots_per_rank < 8 and "gain as much as 8" in found.slots_reason
    assert found.with_slots.gain_ratio >= 0.98 * found.proposed.gain_ratio and found.proposed.slots_per_rank == 8


def test_settings_that_leave_everything_alone_are_to_be_changed() -> None:
    timid = Settings(imbalance_threshold=50, min_batch_tokens=1 << 20)
    found = tuned(steps_of("zipf:ratio=2"), timid)
    assert found.start.gain_ratio == 0 and found.proposed.gain_ratio > 0.2
    assert found.patch["imbalance_threshold"] < 2 and found.patch["min_batch_tokens"] <= 32768
    assert timid.changed(found.patch)  # valid, and every key of it can change while serving


def test_nothing_is_proposed_for_balanced_loads_or_for_batches_too_small_to_gain() -> None:
    for steps in (steps_of("balanced"), steps_of("zipf:ratio=3", tokens_per_rank=8, phase="decode")):
        found = tuned(steps)
        assert found.verdict == "not_worth_it" and found.patch == {}


def test_few_steps_are_no_evidence() -> None:
    found = tuned(steps_of("zipf:ratio=2", steps=LEAST_STEPS - 1))
    assert found.verdict == "not_enough_evidence" and found.patch == {}


def test_phases_and_batches_that_gain_nothing_are_left_alone() -> None:
    small = steps_of("zipf:ratio=2", tokens_per_rank=16, steps=20, phase="decode")
    numbered = [step._replace(step=at) for at, step in enumerate([*steps_of("zipf:ratio=2"), *small])]
    found = tuned(numbered, Settings(imbalance_threshold=50, min_batch_tokens=0))
    by_phase = {one.phase: one for one in found.proposed.classes}
    assert by_phase["prefill"].is_planned and by_phase["prefill"].gain_ratio > 0.2
    assert by_phase["decode"].gain_ratio == 0
    assert [one.steps for one in found.proposed.classes] == [12, 20]


def test_cases_are_ranked_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    setup = Setup(shape=SHAPE, num_ranks=RANKS, options=PlanOptions(cost_model=cost_model("h200")))
    found = tune(Sample.of(SHAPE, steps_of("zipf:ratio=2")), setup, on_case=lambda *progress: told.append(progress))
    assert [case.work for case in found.cases] == sorted(case.work for case in found.cases)
    assert told == sorted(told) and told[-1][0] == told[-1][1] and all(done <= total for done, total in told)


def test_a_sample_is_even_and_bounded_however_long_the_recording() -> None:
    one = StepClass("prefill", 8)
    for number in range(1000):
        one.add(StepCounts(number, "prefill", np.ones((1, 1, 1), dtype=np.int64)), 16)
    kept = [step.step for step in one.steps]
    assert 8 <= len(kept) <= 16 and len(set(np.diff(kept).tolist())) == 1
    assert one.seen == 1000 and one.weight * len(kept) == pytest.approx(1000)
    shape = ModelShape(name="m", layer_numbers=tuple(range(60)), num_experts=256, top_k=8)
    sample = Sample(shape)
    for number in range(200):
        sample.add(StepCounts(number, "prefill", np.ones((60, 2, 256), dtype=np.int64)))
    assert sum(len(of.steps) * 60 for of in sample.classes(600)) <= 600
    assert sample.steps == 200
