"""An engine as the scheduler hears it: real counts, planned by the real planner, told in real Reports."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.loads import imbalance_ratio, skewed_counts
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    PROTOCOL,
    SECONDS_BUCKETS,
    STEP_PHASES,
    Array,
    Directive,
    EngineInfo,
    GroupLoads,
    Histogram,
    PlanSample,
    Report,
    Worth,
)
from llep.placement import Placement
from llep.plan import Plan
from llep.planning import PlanOptions, plan_step

BYTES_PER_SLOT = 3_000_000
PAIR_S = 1e-6  # what a pair takes on the most loaded rank
PROBED_EVERY = 4  # so many lending layer-steps are said to have been compared with plain EP


@dataclass
class Engine:
    """`run(tokens)` is one step through all layers; `reports()` is what every rank says then."""

    name: str = "tiny"
    model_name: str = "org/tiny-moe"
    ep_size: int = 2
    layer_numbers: tuple[int, ...] = (1, 2, 5)
    num_experts: int = 16
    top_k: int = 4
    slots_per_rank: int = 4
    replica_slots_per_rank: int = 2
    seed: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    seq: int = 0
    incarnation: str = "first"
    counting_since_s: float = field(default_factory=lambda: time.time() - 86400)
    errors: dict[str, int] = field(default_factory=dict)
    ranks_per_node: int = 0
    lend_s: float = 0.0  # what a lend costs

    def __post_init__(self) -> None:
        L, R, E = len(self.layer_numbers), self.ep_size, self.num_experts
        self.settings = Settings.parse({"min_chunk_tokens": 1, "min_batch_tokens": 0, **self.start})
        self.start_settings = self.settings.dump()
        self.revision = 0
        self.apply_error = ""
        self.steps = Counter({"prefill": 0, "decode": 0})
        P = len(STEP_PHASES)
        self.tokens_PL = np.zeros((P, L), np.int64)
        self.routed_PLE = np.zeros((P, L, E), np.int64)
        self.routed_PLR = np.zeros((P, L, R), np.int64)
        self.computed_PLR = np.zeros((P, L, R), np.int64)
        self.layer_steps_PL = np.zeros((P, L), np.int64)
        self.imbalance_sum_PLS, self.balancedness_sum_PLS = np.zeros((P, L, 2)), np.zeros((P, L, 2))
        self.imbalance_counts = np.zeros((2, len(IMBALANCE_BUCKETS) + 1), np.int64)
        self.spilled_in_PR, self.spilled_out_PR = np.zeros((P, R), np.int64), np.zeros((P, R), np.int64)
        self.lends_PL = np.zeros((P, L), np.int64)
        self.lends_in_PRK, self.lends_out_PRK = np.zeros((P, R, 2), np.int64), np.zeros((P, R, 2), np.int64)
        self.decisions: dict[str, Counter[str]] = {phase: Counter() for phase in STEP_PHASES}
        self.worth = {phase: Counter[str]() for phase in STEP_PHASES}
        self.predicted_gain_s = dict.fromkeys(STEP_PHASES, 0.0)
        self.live_placement, self.filled_placement = 0, 0
        self.plans: deque[PlanSample] = deque(maxlen=16)
        self.placement = Placement.linear(E, R, self.slots_per_rank)

    def run(self, tokens: int = 1024, hot_share: float = 0.9, phase: str = "prefill") -> None:
        self.steps[phase] += 1
        for layer in range(len(self.layer_numbers)):
            self._run_layer(phase, layer, tokens, hot_share)

    def take(self, directive: Directive) -> None:
        """Run under what the scheduler says, from now on."""
        self.settings, self.revision = Settings.parse(directive.settings), directive.revision
        self.live_placement = directive.placement.number if directive.placement else 0

    def reports(self) -> list[Report]:
        self.seq += 1
        return [self._report(rank) for rank in range(self.ep_size)]

    def counts(self, layer: int, tokens: int, hot_share: float) -> npt.NDArray[np.int64]:
        """Pairs [R, E] that this step routes in the layer."""
        seed = self.seed + 1000 * layer + self.steps.total()
        counts_RE = skewed_counts(1, self.num_experts, tokens * self.top_k, [0, 1], hot_share, seed)
        return np.vstack([counts_RE, np.zeros((self.ep_size - 1, self.num_experts), np.int64)])

    def _run_layer(self, phase: str, layer: int, tokens: int, hot_share: float) -> None:
        counts_RE = self.counts(layer, tokens, hot_share)
        options = PlanOptions(
            imbalance_threshold=self.settings.imbalance_threshold, min_chunk_tokens=self.settings.min_chunk_tokens
        )
        plan = plan_step(self.settings.planner, counts_RE, self.placement, options)
        counts_E = counts_RE.sum(axis=0)
        routed_R = np.zeros(self.ep_size, np.int64)
        np.add.at(routed_R, np.array(self.placement.home_rank), counts_E)
        computed_R = np.array(plan.rank_loads, np.int64)
        at = STEP_PHASES.index(phase), layer
        self.tokens_PL[at] += tokens
        self.routed_PLE[at] += counts_E
        self.routed_PLR[at] += routed_R
        self.computed_PLR[at] += computed_R
        self.layer_steps_PL[at] += 1
        self.decisions[phase][str(plan.decision)] += 1
        for stage, loads in enumerate((routed_R, computed_R)):
            ratio = imbalance_ratio(loads)
            self.imbalance_sum_PLS[(*at, stage)] += ratio
            self.balancedness_sum_PLS[(*at, stage)] += 1 / ratio
            self.imbalance_counts[stage, np.searchsorted(IMBALANCE_BUCKETS, ratio)] += 1
        if plan.lends:
            self._weigh(phase, int(routed_R.max()), int(computed_R.max()), len(plan.lends))
            self._sample(phase, layer, tokens, routed_R, plan)
        for lend in plan.lends:
            per_node = self.ranks_per_node or self.ep_size
            link = int(lend.src_rank // per_node != lend.dst_rank // per_node)
            self.lends_PL[at] += 1
            self.lends_in_PRK[at[0], lend.dst_rank, link] += 1
            self.lends_out_PRK[at[0], lend.src_rank, link] += 1
            self.spilled_in_PR[at[0], lend.dst_rank] += lend.tokens
            self.spilled_out_PR[at[0], lend.src_rank] += lend.tokens

    def _weigh(self, phase: str, routed: int, computed: int, lends: int) -> None:
        """What lending is worth by probes, had there been some."""
        worth = self.worth[phase]
        worth.update(lent_steps=1, lent_pairs=routed)
        worth["lent_s"] += PAIR_S * computed + self.lend_s * lends  # type: ignore[assignment]
        self.predicted_gain_s[phase] += PAIR_S * (routed - computed)
        if worth["lent_steps"] % PROBED_EVERY == 0:
            worth.update(probed_steps=1, probed_pairs=routed)
            worth["probed_s"] += PAIR_S * routed  # type: ignore[assignment]

    def _sample(self, phase: str, layer: int, tokens: int, routed_R: npt.NDArray[np.int64], plan: Plan) -> None:
        sample = PlanSample(
            id=self.plans[-1].id + 1 if self.plans else 1,
            step=self.steps.total(),
            layer=layer,
            phase=phase,
            time_s=time.time(),
            decision=str(plan.decision),
            tokens=tokens,
            routed_R=tuple(map(int, routed_R)),
            computed_R=tuple(map(int, plan.rank_loads)),
            lends=tuple((lend.expert, lend.src_rank, lend.dst_rank, lend.tokens) for lend in plan.lends),
            predicted_gain_s=0.001,
            layer_seconds=0.004,
        )
        self.plans.append(sample)

    def _report(self, rank: int) -> Report:
        return Report(
            protocol=PROTOCOL,
            info=self._info(),
            rank=rank,
            incarnation=self.incarnation,
            seq=self.seq,
            time_s=time.time(),
            counting_s=time.time() - self.counting_since_s,
            step=self.steps.total(),
            steps=dict(self.steps),
            held_revision=self.revision,
            live_revision=self.revision,
            live_settings=self.settings.dump(),
            live_since_step=0,
            live_since_time_s=1_700_000_000.0,
            last_apply_error=self.apply_error,
            phase_seconds={
                step: {phase: self._phase(index, rank, steps) for index, phase in enumerate(LAYER_PHASES)}
                for step, steps in self.steps.items()
            },
            live_placement=self.live_placement,
            filled_placement=self.filled_placement,
            layer_seconds={phase: 0.5 * steps for phase, steps in self.steps.items()},
            worth={phase: Worth(**self.worth[phase]) for phase in STEP_PHASES},
            device_total_bytes=16 << 30,
            device_free_bytes=8 << 30,
            memory_budget_bytes=self.slots_per_rank * BYTES_PER_SLOT,
            memory_used_bytes=rank * BYTES_PER_SLOT,
            memory_peak_bytes=self.slots_per_rank * BYTES_PER_SLOT,
            replica_bytes=2 * BYTES_PER_SLOT,
            errors=self.errors,
            group=self._group() if rank == 0 else None,
        )

    def _info(self) -> EngineInfo:
        return EngineInfo(
            engine=self.name,
            model_name=self.model_name,
            llep_version="0.1.0",
            vllm_version="0.32.0",
            backend="cpu",
            quantization="none",
            dtype="float32",
            ep_size=self.ep_size,
            tp_size=self.ep_size,
            dp_size=1,
            layer_numbers=self.layer_numbers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            slots_per_rank=self.slots_per_rank,
            bytes_per_slot=BYTES_PER_SLOT,
            replica_slots_per_rank=self.replica_slots_per_rank,
            ranks_per_node=self.ranks_per_node,
            max_model_len=4096,
            settings=self.start_settings,
            setting_sources=dict.fromkeys(self.start_settings, "default"),
        )

    def _phase(self, index: int, rank: int, steps: int) -> Histogram:
        counts = [0] * (len(SECONDS_BUCKETS) + 1)
        counts[index % len(counts)] = steps * len(self.layer_numbers)
        return Histogram(tuple(counts), 0.25 * (rank + 1) * steps)

    def _group(self) -> GroupLoads:
        before, after = (
            Histogram(tuple(map(int, self.imbalance_counts[stage])), float(self.imbalance_sum_PLS[:, :, stage].sum()))
            for stage in (0, 1)
        )
        return GroupLoads(
            tokens_PL=Array.of(self.tokens_PL),
            routed_PLE=Array.of(self.routed_PLE),
            routed_PLR=Array.of(self.routed_PLR),
            computed_PLR=Array.of(self.computed_PLR),
            layer_steps_PL=Array.of(self.layer_steps_PL),
            imbalance_sum_PLS=Array.of(self.imbalance_sum_PLS),
            balancedness_sum_PLS=Array.of(self.balancedness_sum_PLS),
            imbalance_histograms=(before, after),
            decisions={phase: dict(decisions) for phase, decisions in self.decisions.items()},
            spilled_in_PR=Array.of(self.spilled_in_PR),
            spilled_out_PR=Array.of(self.spilled_out_PR),
            lends_PL=Array.of(self.lends_PL),
            lends_in_PRK=Array.of(self.lends_in_PRK),
            lends_out_PRK=Array.of(self.lends_out_PRK),
            bytes_per_lend=BYTES_PER_SLOT,
            predicted_gain_s=dict(self.predicted_gain_s),
            last_plan_time_s=1_700_000_100.0 if any(self.decisions.values()) else 0.0,
            home_rank_LE=Array.of(np.tile(self.placement.home_rank, (len(self.layer_numbers), 1)).astype(np.int16)),
            plans=tuple(self.plans),
        )
