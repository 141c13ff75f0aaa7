"""The load window of one rank: everything counted since the engine started, ready to be reported.

Written by the thread that runs the forward pass, read by the one that reports.

Shape letters as in llep.messages: P phases of steps, L layers, R ranks, E experts, S stages, K links.
"""

from __future__ import annotations

import bisect
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llep.loads import imbalance_ratio
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    LINKS,
    MOST_PLANS,
    SECONDS_BUCKETS,
    STAGES,
    STEP_PHASES,
    Array,
    GroupLoads,
    Histogram,
    PlanSample,
    Worth,
)
from llep.moe.layer import Counts, PhaseTimes
from llep.plan import Decision, Plan, node_of

PLANS_PER_REPORT = 4
UNMEASURED_STEPS = 2  # the first that lend, and the first probes, may compile kernels or touch memory first


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStep:
    """One layer of one step with real tokens. planned: what was planned; is_moved: it was carried out (not in shadow).

    is_verified: the layer was computed twice, so its time says nothing about what lending is worth.
    """

    step: int
    phase: str
    layer: int
    counts_RE: Counts
    planned: Plan
    home_loads: Sequence[int]
    is_moved: bool
    is_verified: bool
    times: PhaseTimes
    seconds: float

    @property
    def lends(self) -> int:
        return len(self.planned.lends) if self.is_moved else 0


class _Buckets:
    """A histogram that is filled one value at a time."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        return Histogram(tuple(self._counts), self._sum)


@dataclass(slots=True)
class _Side:
    """Steps that lend, or those that are computed by plain EP for comparison."""

    seconds: float = 0.0
    pairs: int = 0
    steps: int = 0
    skipped: int = 0
    last_step: int = -1

    def add(self, layer_step: LayerStep) -> None:
        is_new = layer_step.step != self.last_step
        self.last_step = layer_step.step
        if is_new and self.skipped < UNMEASURED_STEPS:
            self.skipped += 1
        elif is_new:
            self.steps += 1
        if self.steps:
            self.seconds += layer_step.seconds
            self.pairs += max(layer_step.home_loads)


class LoadWindow:
    """Cumulative counters; every rank of a group holds the same loads, and its own times.

    home_rank_LE: the home rank of each expert in each layer that is counted.
    """

    def __init__(
        self,
        home_rank_LE: npt.NDArray[np.int64],
        ep_size: int,
        top_k: int,
        bytes_per_lend: int,
        ranks_per_node: int | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self._top_k = top_k
        self._bytes_per_lend = bytes_per_lend
        self._ranks_per_node = ranks_per_node
        self._home_rank_LE = home_rank_LE.astype(np.int16)
        P, R, S, K = len(STEP_PHASES), ep_size, len(STAGES), len(LINKS)
        L, E = home_rank_LE.shape
        self._tokens_PL = np.zeros((P, L), np.int64)
        self._routed_PLE = np.zeros((P, L, E), np.int64)
        self._routed_PLR = np.zeros((P, L, R), np.int64)
        self._computed_PLR = np.zeros((P, L, R), np.int64)
        self._layer_steps_PL = np.zeros((P, L), np.int64)
        self._imbalance_sum_PLS = np.zeros((P, L, S), np.float64)
        self._balancedness_sum_PLS = np.zeros((P, L, S), np.float64)
        self._imbalance = (_Buckets(IMBALANCE_BUCKETS), _Buckets(IMBALANCE_BUCKETS))
        self._spilled_in_PR, self._spilled_out_PR = np.zeros((P, R), np.int64), np.zeros((P, R), np.int64)
        self._lends_PL = np.zeros((P, L), np.int64)
        self._lends_in_PRK, self._lends_out_PRK = np.zeros((P, R, K), np.int64), np.zeros((P, R, K), np.int64)
        self._predicted_gain_s = dict.fromkeys(STEP_PHASES, 0.0)
        self._last_plan_time_s = 0.0
        self._phases = {step: {phase: _Buckets(SECONDS_BUCKETS) for phase in LAYER_PHASES} for step in STEP_PHASES}
        self._lent = {phase: _Side() for phase in STEP_PHASES}
        self._probed = {phase: _Side() for phase in STEP_PHASES}
        self._samples = _Samples(top_k)
        self.decisions: dict[str, Counter[str]] = {phase: Counter() for phase in STEP_PHASES}
        self.errors: Counter[str] = Counter()
        self.layer_seconds = dict.fromkeys(STEP_PHASES, 0.0)
        self.slots_used = 0
        self.slots_peak = 0

    def record(self, layer_step: LayerStep, slots_used: int = 0) -> None:
        """Count one layer of one step. slots_used: of this rank's lending pool."""
        at = STEP_PHASES.index(layer_step.phase), layer_step.layer
        planned, home_loads = layer_step.planned, layer_step.home_loads
        planned_loads = planned.rank_loads
        before, after = imbalance_ratio(home_loads), imbalance_ratio(planned_loads)
        routed_E = layer_step.counts_RE.sum(axis=0)
        with self.lock:
            self._tokens_PL[at] += int(routed_E.sum()) // self._top_k
            self._routed_PLE[at] += routed_E
            self._routed_PLR[at] += home_loads
            self._computed_PLR[at] += planned_loads if layer_step.is_moved else home_loads
            self._layer_steps_PL[at] += 1
            self._imbalance_sum_PLS[at] += (before, after)
            self._balancedness_sum_PLS[at] += (1 / before, 1 / after)
            self._imbalance[0].add(before)
            self._imbalance[1].add(after)
            self.decisions[layer_step.phase][planned.decision.value] += 1
            self._last_plan_time_s = time.time()
            if planned.decision in (Decision.LEND, Decision.REPLICA):
                self._predicted_gain_s[layer_step.phase] += max(planned.predicted_gain_s, 0.0)
                self._samples.offer(layer_step)
                if layer_step.is_moved:
                    self._add_moves(at, layer_step.planned)
            self._add_times(layer_step)
            self.slots_used = slots_used
            self.slots_peak = max(self.slots_peak, slots_used)

    def _add_moves(self, at: tuple[int, int], planned: Plan) -> None:
        """at: phase of the step, layer."""
        experts_S, ranks_S, starts_S, stops_S = planned.segments_S4.T
        homes_S = planned.placement.home_rank_E[experts_S]
        away_S = ranks_S != homes_S
        np.add.at(self._spilled_in_PR[at[0]], ranks_S[away_S], (stops_S - starts_S)[away_S])
        np.add.at(self._spilled_out_PR[at[0]], homes_S[away_S], (stops_S - starts_S)[away_S])
        for hop in planned.transfers:
            link = int(self._node_of(hop.src_rank) != self._node_of(hop.dst_rank))
            self._lends_PL[at] += 1
            self._lends_in_PRK[at[0], hop.dst_rank, link] += 1
            self._lends_out_PRK[at[0], hop.src_rank, link] += 1

    def _add_times(self, layer_step: LayerStep) -> None:
        self.layer_seconds[layer_step.phase] += layer_step.seconds
        for phase, seconds in layer_step.times.seconds.items():
            self._phases[layer_step.phase][phase].add(seconds)
        if layer_step.is_verified:
            return
        if layer_step.planned.decision is Decision.PROBE:
            self._probed[layer_step.phase].add(layer_step)
        elif layer_step.lends:
            self._lent[layer_step.phase].add(layer_step)

    def _node_of(self, rank: int) -> int:
        return node_of(rank, self._ranks_per_node)

    def record_error(self, component: str, kind: str) -> None:
        with self.lock:
            self.errors[f"{component}/{kind}"] += 1

    def phase_seconds(self) -> dict[str, dict[str, Histogram]]:
        return {
            step: {phase: buckets.histogram() for phase, buckets in phases.items()}
            for step, phases in self._phases.items()
        }

    def worth(self) -> dict[str, Worth]:
        """What lending is worth by this rank's clock; call with `lock` held."""
        return {
            phase: Worth(
                lent_s=lent.seconds,
                lent_pairs=lent.pairs,
                lent_steps=lent.steps,
                probed_s=probed.seconds,
                probed_pairs=probed.pairs,
                probed_steps=probed.steps,
            )
            for (phase, lent), probed in zip(self._lent.items(), self._probed.values(), strict=True)
        }

    def group_loads(self) -> GroupLoads:
        """What all ranks hold alike; call with `lock` held."""
        return GroupLoads(
            tokens_PL=Array.of(self._tokens_PL),
            routed_PLE=Array.of(self._routed_PLE),
            routed_PLR=Array.of(self._routed_PLR),
            computed_PLR=Array.of(self._computed_PLR),
            layer_steps_PL=Array.of(self._layer_steps_PL),
            imbalance_sum_PLS=Array.of(self._imbalance_sum_PLS),
            balancedness_sum_PLS=Array.of(self._balancedness_sum_PLS),
            imbalance_histograms=(self._imbalance[0].histogram(), self._imbalance[1].histogram()),
            decisions={phase: dict(decisions) for phase, decisions in self.decisions.items()},
            spilled_in_PR=Array.of(self._spilled_in_PR),
            spilled_out_PR=Array.of(self._spilled_out_PR),
            lends_PL=Array.of(self._lends_PL),
            lends_in_PRK=Array.of(self._lends_in_PRK),
            lends_out_PRK=Array.of(self._lends_out_PRK),
            bytes_per_lend=self._bytes_per_lend,
            predicted_gain_s=dict(self._predicted_gain_s),
            last_plan_time_s=self._last_plan_time_s,
            home_rank_LE=Array.of(self._home_rank_LE),
            plans=self._samples.take(),
        )


class _Samples:
    """A fair choice of PLANS_PER_REPORT of the layer-steps since the last report, and the newest chosen before."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._rng = random.Random(0)
        self._offered = 0
        self._chosen: list[tuple[LayerStep, float]] = []
        self._told: deque[PlanSample] = deque(maxlen=MOST_PLANS)
        self._last_id = 0

    def offer(self, layer_step: LayerStep) -> None:
        self._offered += 1
        if len(self._chosen) < PLANS_PER_REPORT:
            self._chosen.append((layer_step, time.time()))
        elif (place := self._rng.randrange(self._offered)) < PLANS_PER_REPORT:
            self._chosen[place] = (layer_step, time.time())

    def take(self) -> tuple[PlanSample, ...]:
        for layer_step, time_s in sorted(self._chosen, key=lambda each: (each[0].step, each[0].layer)):
            self._last_id += 1
            self._told.append(_sample(self._last_id, layer_step, time_s, self._top_k))
        self._offered, self._chosen = 0, []
        return tuple(self._told)


def _sample(number: int, layer_step: LayerStep, time_s: float, top_k: int) -> PlanSample:
    planned = layer_step.planned
    return PlanSample(
        id=number,
        step=layer_step.step,
        layer=layer_step.layer,
        phase=layer_step.phase,
        time_s=time_s,
        decision=planned.decision.value,
        tokens=int(layer_step.counts_RE.sum()) // top_k,
        routed_R=tuple(map(int, layer_step.home_loads)),
        computed_R=tuple(planned.rank_loads),
        lends=tuple((lend.expert, lend.src_rank, lend.dst_rank, lend.tokens) for lend in planned.lends),
        predicted_gain_s=planned.predicted_gain_s,
        layer_seconds=layer_step.seconds,
    )
