"""Which settings a recording asks for: candidates are replayed over a sample of its steps. What holds now is kept where
it gains nearly as much as the best; else the gentlest value that does is proposed. Slots are reserved at start: what is
proposed is judged with those that are there, and what others would bring is told apart.

Steps are sampled by class (phase, and tokens to the power of two), so that a recording of any length takes bounded
memory and time, and so that what each batch size gains is known: `min_batch_tokens` and `phases` follow from that.

Shape letters: L MoE layers, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llep.config import SWEPT, Phases, Planner, Settings
from llep.planning import PlanOptions
from llep.shapes import ModelShape, StepCounts
from llep.simulate import Setup, simulate

MOST_LAYER_STEPS = 3000  # replayed under each candidate
NEARLY = 0.98  # of the best gain: what a gentler setting must keep
LEAST_GAIN_RATIO = 0.03  # of the time in MoE layers: below that nothing is proposed but to leave it
LEAST_STEPS = 10
# What is tried, from the most eager to the gentlest.
CANDIDATES: Mapping[str, tuple[Any, ...]] = {
    "min_chunk_tokens": (16, 64, 256, 1024, 4096),
    "imbalance_threshold": (1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0),
    "capacity_factor": (1.0, 1.1, 1.25),
}
SLOTS = (1, 2, 4, 8)
# As it is; by planner, with the slots that are there and with the most; these, by either number; fewer slots.
MOST_CASES = 7 + 2 * sum(len(values) + 1 for values in CANDIDATES.values()) + len(SLOTS)


@dataclass(slots=True)
class StepClass:
    """Steps of one phase with at least `tokens` tokens and less than twice as many. seen: how many there were."""

    phase: str
    tokens: int
    steps: list[StepCounts] = field(default_factory=list)
    seen: int = 0
    every: int = 1

    @property
    def weight(self) -> float:
        """Steps that each sampled one stands for."""
        return self.seen / len(self.steps)

    def add(self, step: StepCounts, most: int) -> None:
        """Keep one step in `every`; when they get too many, one in twice as many."""
        if self.seen % self.every == 0:
            if len(self.steps) == most:
                del self.steps[1::2]
                self.every *= 2
            if self.seen % self.every == 0:
                self.steps.append(step)
        self.seen += 1


class Sample:
    """Steps of a recording, evenly spread over its course, with the tokens of each expert over all sources."""

    MOST_STEPS = 64  # of one class
    MOST_CLASS_BYTES = 8 << 20

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._most = max(min(self.MOST_STEPS, self.MOST_CLASS_BYTES // (8 * shape.num_layers * shape.num_experts)), 2)
        self._classes: dict[tuple[str, int], StepClass] = {}

    @classmethod
    def of(cls, shape: ModelShape, steps: Iterable[StepCounts]) -> Sample:
        sample = cls(shape)
        for step in steps:
            sample.add(step)
        return sample

    def add(self, step: StepCounts) -> None:
        """Take in the next step of the recording; those without a token are left out."""
        tokens = step_tokens(step, self.shape)
        if tokens:
            key = (step.phase, 1 << (tokens.bit_length() - 1))
            merged = step._replace(counts_LRE=step.counts_LRE.sum(axis=1, keepdims=True))
            self._classes.setdefault(key, StepClass(*key)).add(merged, self._most)

    def classes(self, most_layer_steps: int = MOST_LAYER_STEPS) -> list[StepClass]:
        """By phase and tokens, thinned out to that many layer-steps where there are more."""
        steps = sum(len(one.steps) for one in self._classes.values())
        thinner = -(-steps * self.shape.num_layers // most_layer_steps) or 1
        return [replace(one, steps=one.steps[::thinner]) for _, one in sorted(self._classes.items(), reverse=True)]

    @property
    def steps(self) -> int:
        """All that were seen."""
        return sum(one.seen for one in self._classes.values())


def step_tokens(step: StepCounts, shape: ModelShape) -> int:
    """Tokens of one step over all ranks."""
    return int(step.counts_LRE.sum(axis=(1, 2)).max()) // shape.top_k


@dataclass(frozen=True, slots=True)
class ClassOutcome:
    """One class of steps in a case. steps: all that were seen."""

    phase: str
    tokens: int  # the smallest batch in it; the largest has less than twice as many
    steps: int
    is_planned: bool
    imbalance_ratio_before: float
    imbalance_ratio: float
    gain_ratio: float


@dataclass(frozen=True, slots=True)
class Case:
    """What one choice of settings does to the recording, all steps counted. Imbalance is weighted by load: pairs on the
    most loaded rank / on the mean one. Without a cost model `work` is those pairs instead of seconds."""

    settings: Settings
    slots_per_rank: int
    work_before: float
    work: float
    imbalance_ratio_before: float
    imbalance_ratio: float
    lends_per_layer_step: float
    lend_bytes_per_step: float
    peak_lend_bytes: int  # of weights lent to one rank in one layer
    classes: tuple[ClassOutcome, ...]

    @property
    def gain_ratio(self) -> float:
        """Share of the work that is saved."""
        return 1 - self.work / self.work_before if self.work_before else 0.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """All cases, best first; `proposed` is the gentlest that gains nearly as much as the best with as many slots.

    with_slots: with the fewest slots that gain nearly as much as the most would; `proposed` where that is those.
    """

    start: Case
    proposed: Case
    with_slots: Case
    cases: tuple[Case, ...]
    verdict: Literal["worth_it", "not_worth_it", "not_enough_evidence"]
    reason: str
    steps: int
    sampled_steps: int
    setup: Setup

    @property
    def patch(self) -> dict[str, Any]:
        """The change of settings to make while serving; empty where it isn't worth it."""
        if self.verdict != "worth_it":
            return {}
        return _patch(self.start, self.proposed)

    @property
    def slots_reason(self) -> str:
        """Why another number of slots should be reserved at the next start; '' where there is no reason to."""
        now, then = self.start.slots_per_rank, self.with_slots.slots_per_rank
        if self.verdict == "not_enough_evidence" or now == then:
            return ""
        if then < now:
            return f"{then} per rank gain as much as {now}; they are reserved at start"
        settings = "".join(f", {key}={value}" for key, value in _patch(self.start, self.with_slots).items())
        return (
            f"with {then} per rank instead of {now}{settings} it would fall by {self.with_slots.gain_ratio:.1%}; "
            "they are reserved at start"
        )

    @property
    def config_at_start(self) -> dict[str, Any]:
        """What to start with where slots_reason says so."""
        return {**_patch(self.start, self.with_slots), "slots_per_rank": self.with_slots.slots_per_rank}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        model = self.setup.options.cost_model
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "patch": self.patch,
            "slots_per_rank": self.with_slots.slots_per_rank,
            "slots_reason": self.slots_reason,
            "model": self.setup.shape.name,
            "ranks": self.setup.num_ranks,
            "cost_model": model.name if model else None,
            "steps": self.steps,
            "sampled_steps": self.sampled_steps,
            "start": _case_dict(self.start, self.start, self.steps, is_timed=model is not None),
            "proposed": _case_dict(self.proposed, self.start, self.steps, is_timed=model is not None),
            "with_slots": _case_dict(self.with_slots, self.start, self.steps, is_timed=model is not None),
            "classes": [asdict(one) for one in self.proposed.classes],
            "cases": [_case_dict(case, self.start, self.steps, is_timed=model is not None) for case in self.cases],
        }


def tune(
    sample: Sample,
    setup: Setup,
    start: Settings | None = None,
    on_case: Callable[[int, int], None] = lambda done, total: None,
) -> Tuning:
    """Replay the sample under every candidate. `setup` gives ranks, sizes and costs; its thresholds don't matter.

    on_case(done, total) is called after each candidate; what it raises ends the sweep.
    """
    start = start or Settings()
    replay = _Replay(sample, setup, on_case)
    as_started = replay.case(start, setup.slots_per_rank)
    proposed = with_slots = _swept(replay, start, as_started.slots_per_rank)
    most_slots = min(SLOTS[-1], setup.shape.num_experts)
    if most_slots > proposed.slots_per_rank:
        best = _best(replay, start, most_slots)
        if best.gain_ratio >= LEAST_GAIN_RATIO and NEARLY * _saved(best) > _saved(proposed):
            with_slots = _swept(replay, start, most_slots)
    if with_slots.gain_ratio >= LEAST_GAIN_RATIO:
        fewer = (slots for slots in SLOTS if slots < with_slots.slots_per_rank)
        tried = (replay.case(with_slots.settings, slots) for slots in fewer)
        with_slots = next((case for case in tried if _saved(case) >= NEARLY * _saved(with_slots)), with_slots)
    on_case(MOST_CASES, MOST_CASES)
    cases = sorted(replay.found, key=lambda case: (case.work, case.lends_per_layer_step))
    verdict, reason = _judge(proposed, replay, sample.steps)
    return Tuning(
        start=as_started,
        proposed=proposed,
        with_slots=with_slots,
        cases=tuple(cases),
        verdict=verdict,
        reason=reason,
        steps=sample.steps,
        sampled_steps=replay.sampled_steps,
        setup=replay.setup,
    )


def _best(replay: _Replay, start: Settings, slots: int) -> Case:
    """What the most eager settings come to with so many slots, by the better planner."""
    eager = {key: values[0] for key, values in CANDIDATES.items()}
    everywhere = start.model_copy(update=eager | {"min_batch_tokens": 0, "phases": Phases.BOTH})
    best = replay.case(everywhere.model_copy(update={"planner": Planner.QUOTA}), slots)
    of_paper = replay.case(everywhere.model_copy(update={"planner": Planner.LEAST_LOADED}), slots)
    return of_paper if _saved(of_paper) * NEARLY > _saved(best) else best


def _swept(replay: _Replay, start: Settings, slots: int) -> Case:
    """The gentlest settings that gain nearly as much as the best with so many slots."""
    proposed = best = _best(replay, start, slots)
    for key, values in CANDIDATES.items():
        choices = dict.fromkeys((getattr(start, key), *reversed(values)))
        tried = [replay.case(proposed.settings.model_copy(update={key: value}), slots) for value in choices]
        proposed = next((case for case in tried if _saved(case) >= NEARLY * _saved(best)), proposed)
    return replay.gentlest(proposed, start, _saved(best))


def _saved(case: Case) -> float:
    return case.work_before - case.work


def _judge(proposed: Case, replay: _Replay, steps: int) -> tuple[Any, str]:
    what = "time in MoE layers" if replay.is_timed else "load of the most loaded rank"
    before, after = proposed.imbalance_ratio_before, proposed.imbalance_ratio
    seen = f"imbalance {before:.2f} becomes {after:.2f} over {steps} steps"
    if steps < LEAST_STEPS:
        return "not_enough_evidence", f"{steps} steps are too few to judge by: record at least {LEAST_STEPS}"
    if proposed.gain_ratio < LEAST_GAIN_RATIO:
        return "not_worth_it", f"the {what} would fall by {proposed.gain_ratio:.1%}, {seen}"
    return "worth_it", f"the {what} falls by {proposed.gain_ratio:.1%}, {seen}"


@dataclass(frozen=True, slots=True)
class _Totals:
    """What one class of steps comes to under one choice, by sampled steps."""

    work: float
    highest: float  # pairs on the most loaded rank, and on the mean one
    mean: float
    layer_steps: int
    lends: int
    most_lends: int


class _Replay:
    """Replays classes under settings, and remembers what each choice of the planner's own settings came to."""

    def __init__(self, sample: Sample, setup: Setup, on_case: Callable[[int, int], None]) -> None:
        self.setup, self._on_case = setup, on_case
        self.is_timed = setup.options.cost_model is not None
        self._classes = sample.classes()
        self.sampled_steps = sum(len(one.steps) for one in self._classes)
        self._home = [self._run(one, replace(setup, slots_per_rank=0), "home") for one in self._classes]
        self.found: list[Case] = []
        self._tried = 0

    def case(self, settings: Settings, slots: int) -> Case:
        """The outcome of these settings; reported as one more case."""
        slots = min(slots, self.setup.shape.num_experts)
        known = (case for case in self.found if (case.settings, case.slots_per_rank) == (settings, slots))
        found = next(known, None) or self._sum(settings, slots, self._planned(settings, slots))
        if found not in self.found:
            self.found.append(found)
        self._tried += 1
        self._on_case(self._tried, MOST_CASES)
        return found

    def gentlest(self, case: Case, start: Settings, best_saved: float) -> Case:
        """The same, leaving alone phases and batch sizes without which nearly as much is gained."""
        planned = self._planned(case.settings, case.slots_per_rank)
        sizes = sorted({one.tokens for one in self._classes}, reverse=True)
        has_both = len({one.phase for one in self._classes}) > 1  # of a phase that was not seen nothing is known
        for key, values in (
            ("phases", (start.phases, *((Phases.PREFILL, Phases.DECODE) if has_both else ()), Phases.BOTH)),
            ("min_batch_tokens", (start.min_batch_tokens, *sizes)),
        ):
            for value in values:
                tried = self._sum(case.settings.model_copy(update={key: value}), case.slots_per_rank, planned)
                if _saved(tried) >= NEARLY * best_saved:
                    case = tried
                    break
        if case not in self.found:
            self.found.append(case)
        return case

    def _planned(self, settings: Settings, slots: int) -> list[_Totals]:
        options = replace(
            self.setup.options,
            imbalance_threshold=settings.imbalance_threshold,
            capacity_factor=settings.capacity_factor,
            min_chunk_tokens=settings.min_chunk_tokens,
        )
        setup = replace(self.setup, slots_per_rank=slots, options=options)
        return [self._run(one, setup, settings.planner) for one in self._classes]

    def _run(self, one: StepClass, setup: Setup, planner: str) -> _Totals:
        options: PlanOptions = replace(setup.options, phase="decode" if one.phase == "decode" else "prefill")
        (tally,) = simulate(one.steps, replace(setup, options=options), [planner]).tallies
        work = tally.predicted_s if self.is_timed else tally.highest_tokens
        most_lends = int(tally.most_lends_R.max())
        return _Totals(work, tally.highest_tokens, tally.mean_tokens, tally.ratios.count, tally.lends, most_lends)

    def _sum(self, settings: Settings, slots: int, planned: list[_Totals]) -> Case:
        """All classes together, each step counted as often as it stands for others."""
        chosen = [
            (one.weight, home, plan if _is_planned(settings, one) else home)
            for one, home, plan in zip(self._classes, self._home, planned, strict=True)
        ]
        steps = sum(weight * len(one.steps) for (weight, _, _), one in zip(chosen, self._classes, strict=True))
        layer_steps = sum(weight * home.layer_steps for weight, home, _ in chosen) or 1.0
        mean = sum(weight * home.mean for weight, home, _ in chosen) or 1.0
        lends = sum(weight * plan.lends for weight, _, plan in chosen)
        size = self.setup.bytes_per_expert
        return Case(
            settings=settings,
            slots_per_rank=slots,
            work_before=sum(weight * home.work for weight, home, _ in chosen),
            work=sum(weight * plan.work for weight, _, plan in chosen),
            imbalance_ratio_before=sum(weight * home.highest for weight, home, _ in chosen) / mean,
            imbalance_ratio=sum(weight * plan.highest for weight, _, plan in chosen) / mean,
            lends_per_layer_step=lends / layer_steps,
            lend_bytes_per_step=lends * size / (steps or 1.0),
            peak_lend_bytes=max((plan.most_lends for _, _, plan in chosen), default=0) * size,
            classes=tuple(
                ClassOutcome(
                    phase=one.phase,
                    tokens=one.tokens,
                    steps=one.seen,
                    is_planned=_is_planned(settings, one),
                    imbalance_ratio_before=home.highest / (home.mean or 1.0),
                    imbalance_ratio=plan.highest / (plan.mean or 1.0),
                    gain_ratio=1 - plan.work / home.work if home.work else 0.0,
                )
                for one, (_, home, plan) in zip(self._classes, chosen, strict=True)
            ),
        )


def _is_planned(settings: Settings, one: StepClass) -> bool:
    return settings.phases in (Phases.BOTH, one.phase) and one.tokens >= settings.min_batch_tokens


def _patch(start: Case, case: Case) -> dict[str, Any]:
    now, then = start.settings.dump(), case.settings.dump()
    return {key: value for key, value in then.items() if value != now[key]}


def _case_dict(case: Case, start: Case, steps: int, *, is_timed: bool) -> dict[str, Any]:
    values = case.settings.dump()
    return {
        "patch": _patch(start, case),
        "settings": {key: values[key] for key in SWEPT},
        "slots_per_rank": case.slots_per_rank,
        "gain_ratio": round(case.gain_ratio, 6),
        "seconds_per_step_before": case.work_before / steps if is_timed else None,
        "seconds_per_step": case.work / steps if is_timed else None,
        "imbalance_ratio_before": round(case.imbalance_ratio_before, 6),
        "imbalance_ratio": round(case.imbalance_ratio, 6),
        "lends_per_layer_step": round(case.lends_per_layer_step, 6),
        "lend_bytes_per_step": case.lend_bytes_per_step,
        "peak_lend_bytes": case.peak_lend_bytes,
    }
