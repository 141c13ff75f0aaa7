"""Engines as the scheduler hears them: real Reports of any shape, encoded as workers encode them."""

from __future__ import annotations

import time
import uuid

import numpy as np

from llep.config import Settings
from llep.cost import cost_model
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    PROTOCOL,
    STEP_PHASES,
    Array,
    EngineInfo,
    GroupLoads,
    Histogram,
    PlanSample,
    Report,
    Worth,
    decode_report,
    encode,
)
from llep.placement import Placement
from llep.plan import Decision


class SimulatedEngine:
    """All ranks of one engine. A second of traffic is the same each time; what is reported grows."""

    def __init__(self, name: str, *, ranks: int, layers: int, experts: int, top_k: int = 8, seed: int = 0) -> None:
        self._R, self._L, self._E, self._top_k = ranks, layers, experts, top_k
        rng = np.random.default_rng(seed)
        homes_E = Placement.linear(experts, ranks, 0).home_rank_E
        self._home_LE = Array.of(np.tile(homes_E, (layers, 1)).astype(np.int16))
        tokens_P = np.array([4096 * ranks, 64 * ranks])
        weights_E = np.arange(1.0, experts + 1.0) ** -0.7
        shares_LE = np.array([rng.permutation(weights_E / weights_E.sum()) for _ in range(layers)])
        self._routed_PLE = np.stack([rng.multinomial(tokens * top_k, shares_LE) for tokens in tokens_P])
        self._tokens_PL = np.tile(tokens_P[:, None], (1, layers))
        by_rank = np.zeros((2, layers, ranks), dtype=np.int64)
        for rank in range(ranks):
            by_rank[:, :, rank] = self._routed_PLE[:, :, homes_E == rank].sum(axis=2)
        self._routed_PLR = by_rank
        total_PL = self._routed_PLE.sum(axis=2)
        even_PLR = np.repeat((total_PL // ranks)[:, :, None], ranks, axis=2)
        even_PLR[:, :, 0] += total_PL - even_PLR.sum(axis=2)
        self._computed_PLR = even_PLR
        self._seconds = 0
        self.incarnation = uuid.uuid4().hex
        settings = Settings().dump()
        self.info = EngineInfo(
            engine=name,
            model_name="org/simulated",
            llep_version="0.1.0",
            vllm_version="0.32.0",
            backend="cpu",
            quantization="none",
            dtype="bfloat16",
            ep_size=ranks,
            tp_size=ranks,
            dp_size=1,
            layer_numbers=tuple(range(3, 3 + layers)),
            num_experts=experts,
            top_k=top_k,
            slots_per_rank=4,
            bytes_per_slot=44_000_000,
            replica_slots_per_rank=layers,
            ranks_per_node=min(ranks, 8),
            max_model_len=4096,
            settings=settings,
            setting_sources=dict.fromkeys(settings, "default"),
            cost_model=cost_model("h200"),
        )
        self._settings = settings

    def reports(self) -> list[bytes]:
        """What every rank says after one more second."""
        self._seconds += 1
        return [encode(self._report(rank)) for rank in range(self._R)]

    def report_of_group(self) -> bytes:
        """What rank 0 says after one more second."""
        self._seconds += 1
        return encode(self._report(0))

    def _report(self, rank: int) -> Report:
        seconds = self._seconds
        histogram = Histogram((0, 0, 100 * seconds, 1000 * seconds, 10 * seconds, 0, 0), 0.05 * seconds)
        worth = Worth(
            lent_s=0.5 * seconds,
            lent_pairs=1000 * seconds,
            lent_steps=10 * seconds,
            probed_s=0.006 * seconds,
            probed_pairs=10 * seconds,
            probed_steps=seconds // 10,
        )
        return Report(
            protocol=PROTOCOL,
            info=self.info,
            rank=rank,
            incarnation=self.incarnation,
            seq=seconds,
            time_s=time.time(),
            counting_s=86400.0,
            step=20 * seconds,
            steps={"prefill": 5 * seconds, "decode": 15 * seconds},
            held_revision=0,
            live_revision=0,
            live_settings=self._settings,
            live_since_step=0,
            live_since_time_s=1.0,
            last_apply_error="",
            live_placement=0,
            filled_placement=0,
            phase_seconds=dict.fromkeys(STEP_PHASES, dict.fromkeys(LAYER_PHASES, histogram)),
            layer_seconds={"prefill": 0.4 * seconds, "decode": 0.1 * seconds},
            worth=dict.fromkeys(STEP_PHASES, worth),
            device_total_bytes=80 << 30,
            device_free_bytes=8 << 30,
            memory_budget_bytes=1 << 30,
            memory_used_bytes=1 << 29,
            memory_peak_bytes=1 << 29,
            replica_bytes=0,
            errors={},
            group=self._group() if rank == 0 else None,
        )

    def _group(self) -> GroupLoads:
        seconds, L, R = self._seconds, self._L, self._R
        steps_PL = np.repeat(np.array([[5], [15]]) * seconds, L, axis=1)
        histogram = Histogram((*(0 for _ in IMBALANCE_BUCKETS), int(steps_PL.sum())), 1.0)
        ones_PR, ones_PRK = np.full((2, R), seconds), np.full((2, R, 2), seconds)
        return GroupLoads(
            tokens_PL=Array.of(self._tokens_PL * seconds),
            routed_PLE=Array.of(self._routed_PLE * seconds),
            routed_PLR=Array.of(self._routed_PLR * seconds),
            computed_PLR=Array.of(self._computed_PLR * seconds),
            layer_steps_PL=Array.of(steps_PL),
            imbalance_sum_PLS=Array.of(np.stack([1.8 * steps_PL, 1.05 * steps_PL], axis=2)),
            balancedness_sum_PLS=Array.of(np.stack([0.6 * steps_PL, 0.95 * steps_PL], axis=2)),
            imbalance_histograms=(histogram, histogram),
            decisions=dict.fromkeys(STEP_PHASES, dict.fromkeys(map(str, Decision), 50 * seconds)),
            spilled_in_PR=Array.of(50 * ones_PR),
            spilled_out_PR=Array.of(50 * ones_PR),
            lends_PL=Array.of(np.full((2, L), seconds)),
            lends_in_PRK=Array.of(ones_PRK),
            lends_out_PRK=Array.of(ones_PRK),
            bytes_per_lend=44_000_000,
            predicted_gain_s=dict.fromkeys(STEP_PHASES, 0.05 * seconds),
            last_plan_time_s=time.time(),
            home_rank_LE=self._home_LE,
            plans=tuple(self._plan(seconds + number) for number in range(4)),
        )

    def _plan(self, number: int) -> PlanSample:
        return PlanSample(
            id=number,
            step=20 * self._seconds,
            layer=0,
            phase="prefill",
            time_s=time.time(),
            decision="lend",
            tokens=4096,
            routed_R=tuple(self._routed_PLR[0, 0].tolist()),
            computed_R=tuple(self._computed_PLR[0, 0].tolist()),
            lends=tuple((expert, 0, self._R - 1, 100) for expert in range(4)),
            predicted_gain_s=0.001,
            layer_seconds=0.01,
        )


def report_bytes(engine: SimulatedEngine) -> tuple[int, int]:
    """Size of rank 0's report and of another's."""
    sizes = [len(data) for data in engine.reports()]
    return sizes[0], sizes[-1]


def as_reports(engine: SimulatedEngine) -> list[Report]:
    return [decode_report(data) for data in engine.reports()]
