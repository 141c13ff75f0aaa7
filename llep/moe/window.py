"""The load window of one rank: everything counted since the engine started, ready to be reported.

Written by the thread that runs the forward pass, read by the one that reports.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llep.loads import imbalance_ratio
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    SECONDS_BUCKETS,
    Array,
    GroupLoads,
    Histogram,
)
from llep.moe.layer import Counts, PhaseTimes
from llep.plan import Plan


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


class LoadWindow:
    """Cumulative counters over L layers, R ranks and E experts; every rank of a group holds the same loads."""

    def __init__(self, num_layers: int, ep_size: int, num_experts: int, top_k: int, bytes_per_lend: int) -> None:
        self.lock = threading.Lock()
        self._top_k = top_k
        self._bytes_per_lend = bytes_per_lend
        self._tokens_L = np.zeros(num_layers, np.int64)
        self._routed_LE = np.zeros((num_layers, num_experts), np.int64)
        self._routed_LR = np.zeros((num_layers, ep_size), np.int64)
        self._computed_LR = np.zeros((num_layers, ep_size), np.int64)
        self._layer_steps_L = np.zeros(num_layers, np.int64)
        self._imbalance_sum_LS = np.zeros((num_layers, 2), np.float64)
        self._imbalance = (_Buckets(IMBALANCE_BUCKETS), _Buckets(IMBALANCE_BUCKETS))
        self._spilled_in_R, self._spilled_out_R = np.zeros(ep_size, np.int64), np.zeros(ep_size, np.int64)
        self._lends_in_R, self._lends_out_R = np.zeros(ep_size, np.int64), np.zeros(ep_size, np.int64)
        self._last_plan_time_s = 0.0
        self._phases = {phase: _Buckets(SECONDS_BUCKETS) for phase in LAYER_PHASES}
        self.decisions: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.layer_seconds = 0.0
        self.slots_used = 0
        self.slots_peak = 0

    def record(
        self,
        layer: int,
        counts_RE: Counts,
        planned: Plan,
        home_loads: Sequence[int],
        is_moved: bool,
        slots_used: int,
    ) -> None:
        """Count one layer of one step with real tokens. is_moved: the plan was carried out, not only made (shadow)."""
        planned_loads = planned.rank_loads
        before, after = imbalance_ratio(home_loads), imbalance_ratio(planned_loads)
        routed_E = counts_RE.sum(axis=0)
        with self.lock:
            self._tokens_L[layer] += int(routed_E.sum()) // self._top_k
            self._routed_LE[layer] += routed_E
            self._routed_LR[layer] += home_loads
            self._computed_LR[layer] += planned_loads if is_moved else home_loads
            self._layer_steps_L[layer] += 1
            self._imbalance_sum_LS[layer] += (before, after)
            self._imbalance[0].add(before)
            self._imbalance[1].add(after)
            self.decisions[planned.decision.value] += 1
            self._last_plan_time_s = time.time()
            if is_moved:
                for lend in planned.lends:
                    self._spilled_in_R[lend.dst_rank] += lend.tokens
                    self._spilled_out_R[lend.src_rank] += lend.tokens
                    self._lends_in_R[lend.dst_rank] += 1
                    self._lends_out_R[lend.src_rank] += 1
            self.slots_used = slots_used
            self.slots_peak = max(self.slots_peak, slots_used)

    def record_times(self, times: PhaseTimes, layer_seconds: float) -> None:
        """Count this rank's time in one layer of one step with real tokens."""
        with self.lock:
            self.layer_seconds += layer_seconds
            for phase, seconds in times.seconds.items():
                self._phases[phase].add(seconds)

    def record_error(self, component: str, kind: str) -> None:
        with self.lock:
            self.errors[f"{component}/{kind}"] += 1

    def phase_seconds(self) -> dict[str, Histogram]:
        return {phase: buckets.histogram() for phase, buckets in self._phases.items()}

    def group_loads(self) -> GroupLoads:
        """What all ranks hold alike; call with `lock` held."""
        return GroupLoads(
            tokens_L=Array.of(self._tokens_L),
            routed_LE=Array.of(self._routed_LE),
            routed_LR=Array.of(self._routed_LR),
            computed_LR=Array.of(self._computed_LR),
            layer_steps_L=Array.of(self._layer_steps_L),
            imbalance_sum_LS=Array.of(self._imbalance_sum_LS),
            imbalance_histograms=(self._imbalance[0].histogram(), self._imbalance[1].histogram()),
            decisions=dict(self.decisions),
            spilled_in_R=Array.of(self._spilled_in_R),
            spilled_out_R=Array.of(self._spilled_out_R),
            lends_in_R=Array.of(self._lends_in_R),
            lends_out_R=Array.of(self._lends_out_R),
            bytes_per_lend=self._bytes_per_lend,
            last_plan_time_s=self._last_plan_time_s,
        )
