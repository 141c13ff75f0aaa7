"""A recording, counted once and replayed in part: everything that the page shows, as plain data.

Who is popular is read off every step; what lending would do is replayed over a sample of the steps.

Shape letters: L MoE layers, R ranks, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.errors import SettingsError
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step
from llep.planning.policy import Step, may_plan
from llep.shapes import ModelShape, StepCounts, split_sources
from llep.simulate import Setup, simulate, summary
from llep.tune import Sample, Tuning, step_tokens, tune

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RANKS_TRIED = (2, 4, 8, 16, 32, 64)
PLANNERS = ("home", "least_loaded", "quota", "eplb", "eplb+1", "replicas+1", "quota+1")
HOTTEST_SHOWN = 20
COURSE_STEPS = 400  # of the replay that follows the recording's course
COURSE_LAYER_STEPS = 4000
WINDOW_STEPS = 10  # of the sample: after so many steps planners of placements plan anew


@dataclass(frozen=True, slots=True)
class HotExpert:
    """share: of its layer's pairs; load_ratio: times the fair share; hottest_ratio: share of the steps in which it is
    its layer's hottest."""

    layer: int
    expert: int
    home_rank: int
    share: float
    load_ratio: float
    hottest_ratio: float


@dataclass(slots=True)
class PhaseCounts:
    """Every step of one phase, added up. tokens_of_step: of each step, for their distribution."""

    loads_LE: Counts
    hottest_LE: Counts
    tokens_of_step: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.tokens_of_step)


@dataclass(frozen=True, slots=True)
class Course:
    """The replay of steps in their order under the proposed settings.

    steps, before, after: of `phase` alone, the one with most tokens; ratios are means over layers. By layer all steps
    count, weighted by their load.
    """

    phase: str
    steps: list[int]
    before: list[float]
    after: list[float]
    before_LR: Floats
    after_LR: Floats
    ratio_before_L: Floats
    ratio_after_L: Floats
    decisions: dict[str, int]
    lends_in_R: Counts
    lends_out_R: Counts


@dataclass(frozen=True, slots=True)
class RanksOutcome:
    """What the proposed settings come to on that many ranks."""

    ranks: int
    is_recorded: bool
    imbalance_ratio_before: float
    imbalance_ratio: float
    gain_ratio: float
    lends_per_layer_step: float


@dataclass(frozen=True, slots=True)
class Findings:
    source: str
    shape: ModelShape
    setup: Setup
    recorded_ranks: int
    phases: dict[str, PhaseCounts]
    tuning: Tuning
    course: Course
    by_ranks: list[RanksOutcome]
    planners: list[dict[str, Any]]  # of `simulate.summary`
    hot: list[HotExpert]
    notes: list[str]

    @property
    def loads_LE(self) -> Counts:
        total: Counts = np.sum([one.loads_LE for one in self.phases.values()], axis=0)
        return total


def analyse(
    steps: Iterable[StepCounts],
    setup: Setup,
    *,
    source: str,
    recorded_ranks: int,
    start: Settings | None = None,
    notes: Callable[[], Sequence[str]] = tuple,
    on_stage: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Findings:
    """Read the steps once and replay what is needed; setup gives ranks, sizes and costs. on_stage(what, done, total).

    Raises SettingsError if there is no step with a token.
    """
    shape = setup.shape
    sample, phases, course = Sample(shape), dict[str, PhaseCounts](), _Evenly(shape)
    placement = Placement.linear(shape.num_experts, setup.num_ranks, 0)
    for number, step in enumerate(steps, start=1):
        sample.add(step)
        if step.counts_LRE.any():
            _count(phases, step, shape)
            course.add(step)
        on_stage("reading", number, 0)
    if not phases:
        raise SettingsError(f"{source} holds no step with a token: record while the engine serves")
    tuning = tune(sample, setup, start, lambda done, total: on_stage("settings", done, total))
    settings = tuning.proposed.settings
    tuned = _with(setup, settings, tuning.proposed.slots_per_rank)
    by_ranks = []
    tried = sorted({*RANKS_TRIED, setup.num_ranks})
    for at, ranks in enumerate(tried):
        if ranks <= shape.num_experts:
            by_ranks.append(_on_ranks(sample, tuned, settings, ranks))
        on_stage("ranks", at + 1, len(tried))
    on_stage("planners", 0, 1)
    main = max(phases, key=lambda name: sum(phases[name].tokens_of_step))
    planners = _planners(course.steps(), tuned)
    return Findings(
        source=source,
        shape=shape,
        setup=setup,
        recorded_ranks=recorded_ranks,
        phases=phases,
        tuning=tuning,
        course=_follow(course.steps(), tuned, settings, main),
        by_ranks=by_ranks,
        planners=planners,
        hot=_hot(phases, shape, placement),
        notes=list(notes()),
    )


class _Evenly:
    """Steps in their order, evenly thinned out when there are more than the page can show."""

    def __init__(self, shape: ModelShape) -> None:
        fits = (16 << 20) // (8 * shape.num_layers * shape.num_experts)
        self._most = max(min(COURSE_STEPS, COURSE_LAYER_STEPS // shape.num_layers, fits), 2)
        self._kept: list[StepCounts] = []
        self._seen, self._every = 0, 1

    def add(self, step: StepCounts) -> None:
        if self._seen % self._every == 0:
            if len(self._kept) == self._most:
                del self._kept[1::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self._kept.append(step._replace(counts_LRE=step.counts_LRE.sum(axis=1, keepdims=True)))
        self._seen += 1

    def steps(self) -> list[StepCounts]:
        return self._kept


def _count(phases: dict[str, PhaseCounts], step: StepCounts, shape: ModelShape) -> None:
    if step.phase not in phases:
        size = (shape.num_layers, shape.num_experts)
        phases[step.phase] = PhaseCounts(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))
    one, loads_LE = phases[step.phase], step.counts_LRE.sum(axis=1)
    busy = np.flatnonzero(loads_LE.any(axis=1))
    one.loads_LE += loads_LE
    one.hottest_LE[busy, loads_LE[busy].argmax(axis=1)] += 1
    one.tokens_of_step.append(step_tokens(step, shape))


def rank_loads(loads_LE: Counts, placement: Placement) -> Counts:
    """Pairs of each rank under plain EP [L, R]."""
    loads_LR = np.zeros((len(loads_LE), placement.ep_size), dtype=np.int64)
    np.add.at(loads_LR.T, placement.home_rank_E, loads_LE.T)
    return loads_LR


def _with(setup: Setup, settings: Settings, slots: int) -> Setup:
    options = replace(
        setup.options,
        imbalance_threshold=settings.imbalance_threshold,
        capacity_factor=settings.capacity_factor,
        min_chunk_tokens=settings.min_chunk_tokens,
    )
    return replace(setup, slots_per_rank=slots, options=options, window_steps=WINDOW_STEPS)


def _on_ranks(sample: Sample, setup: Setup, settings: Settings, ranks: int) -> RanksOutcome:
    """The same settings, small batches aside: fewer ranks have more tokens each."""
    per_rank = replace(setup, num_ranks=ranks, slots_per_rank=min(setup.slots_per_rank, setup.shape.num_experts))
    before = after = mean = work_before = work = lends = layer_steps = 0.0
    for one in sample.classes(1000):
        steps, options = one.steps, replace(per_rank.options, phase=_phase(one.phase))
        planner = settings.planner if one.tokens >= settings.min_batch_tokens else "home"
        found = simulate(steps, replace(per_rank, options=options), ["home", planner]).tallies
        home, plan = found[0], found[-1]
        is_timed = options.cost_model is not None
        before += one.weight * home.highest_tokens
        after += one.weight * plan.highest_tokens
        mean += one.weight * home.mean_tokens
        work_before += one.weight * (home.predicted_s if is_timed else home.highest_tokens)
        work += one.weight * (plan.predicted_s if is_timed else plan.highest_tokens)
        lends += one.weight * plan.lends
        layer_steps += one.weight * home.ratios.count
    return RanksOutcome(
        ranks=ranks,
        is_recorded=ranks == setup.num_ranks,
        imbalance_ratio_before=before / mean,
        imbalance_ratio=after / mean,
        gain_ratio=1 - work / work_before,
        lends_per_layer_step=lends / layer_steps,
    )


def _phase(phase: str) -> Any:
    return phase


def _planners(steps: Sequence[StepCounts], setup: Setup) -> list[dict[str, Any]]:
    """Planners side by side over the course; EPLB needs equally many experts on each rank."""
    is_even = setup.shape.num_experts % setup.num_ranks == 0
    names = [name for name in PLANNERS if is_even or not name.startswith("eplb")]
    found: list[dict[str, Any]] = summary(simulate(steps, setup, names))["planners"]
    return found


def _follow(steps: Sequence[StepCounts], setup: Setup, settings: Settings, phase: str) -> Course:
    shape, ranks = setup.shape, setup.num_ranks
    placement = Placement.linear(shape.num_experts, ranks, setup.slots_per_rank)
    size = (shape.num_layers, ranks)
    before_LR, after_LR = np.zeros(size), np.zeros(size)
    highest_before_L, highest_after_L = np.zeros(shape.num_layers), np.zeros(shape.num_layers)
    lends_in_R, lends_out_R = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    decisions: Counter[str] = Counter()
    numbers, before, after = [], [], []
    for step in steps:
        options = replace(setup.options, phase=_phase(step.phase), bytes_per_expert=setup.bytes_per_expert)
        reason = may_plan(settings, Step(step.phase, step_tokens(step, shape)), 0)
        loads_LE = step.counts_LRE.sum(axis=1)
        home_LR = rank_loads(loads_LE, placement)
        loads_LR = home_LR.copy()
        busy = np.flatnonzero(loads_LE.any(axis=1))
        for layer in busy.tolist() if reason is None else ():
            plan = _plan(settings, split_sources(step.counts_LRE[layer], ranks), placement, options)
            loads_LR[layer] = plan.rank_loads
            decisions[plan.decision.value] += 1
            for lend in plan.lends:
                lends_in_R[lend.dst_rank] += 1
                lends_out_R[lend.src_rank] += 1
        if reason is not None:
            decisions[reason.value] += len(busy)
        before_LR += home_LR
        after_LR += loads_LR
        highest_before_L += home_LR.max(axis=1)
        highest_after_L += loads_LR.max(axis=1)
        if step.phase == phase:
            numbers.append(step.step)
            before.append(_mean_ratio(home_LR[busy]))
            after.append(_mean_ratio(loads_LR[busy]))
    mean_L = np.maximum(before_LR.mean(axis=1), 1e-9)
    return Course(
        phase=phase,
        steps=numbers,
        before=before,
        after=after,
        before_LR=before_LR,
        after_LR=after_LR,
        ratio_before_L=highest_before_L / mean_L,
        ratio_after_L=highest_after_L / mean_L,
        decisions=dict(decisions.most_common()),
        lends_in_R=lends_in_R,
        lends_out_R=lends_out_R,
    )


def _mean_ratio(loads_LR: Counts) -> float:
    return float((loads_LR.max(axis=1) / loads_LR.mean(axis=1)).mean())


def _plan(settings: Settings, counts_RE: Counts, placement: Placement, options: PlanOptions) -> Any:
    return plan_step(settings.planner.value, counts_RE, placement, options)


def _hot(phases: dict[str, PhaseCounts], shape: ModelShape, placement: Placement) -> list[HotExpert]:
    loads_LE = np.sum([one.loads_LE for one in phases.values()], axis=0)
    hottest_LE = np.sum([one.hottest_LE for one in phases.values()], axis=0)
    steps = sum(one.steps for one in phases.values())
    share_LE = loads_LE / np.maximum(loads_LE.sum(axis=1, keepdims=True), 1)
    order = np.argsort(-share_LE, axis=None, kind="stable")[:HOTTEST_SHOWN]
    return [
        HotExpert(
            layer=shape.layer_numbers[layer],
            expert=expert,
            home_rank=placement.home_rank[expert],
            share=float(share_LE[layer, expert]),
            load_ratio=float(share_LE[layer, expert] * shape.num_experts),
            hottest_ratio=float(hottest_LE[layer, expert] / max(steps, 1)),
        )
        for layer, expert in (divmod(int(at), shape.num_experts) for at in order)
    ]
