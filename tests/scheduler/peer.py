"""An engine's workers as the agent sees them: they report what random steps under the live settings did.

`Workers` makes the reports; `python -m tests.scheduler.peer` is a process of its own that steps for ever, so that one
can see whether it goes on when everything else is gone. It talks as vLLM's workers do: settings agreed by
llep.moe.agreement, and llep.vllm_plugin.courier's thread for each rank. SIGUSR1: the next reports fail.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
import uuid
from collections import Counter, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from llep.config import Mode, Settings
from llep.loads import imbalance_ratio
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    MOST_PLANS,
    PROTOCOL,
    SECONDS_BUCKETS,
    STEP_PHASES,
    Array,
    Directive,
    EngineInfo,
    GroupLoads,
    Histogram,
    PlacementOrder,
    PlanSample,
    Report,
    Worth,
)
from llep.moe.agreement import AgreedSettings
from llep.vllm_plugin.courier import AgentProcess, Courier

BYTES_PER_SLOT = 1000
STEP_S = 0.02


class Workers:
    """All ranks of one engine: two experts per rank, the first rank's are hot."""

    def __init__(
        self,
        engine: str = "tiny",
        ep_size: int = 2,
        num_layers: int = 3,
        seed: int = 0,
        model_name: str = "org/tiny",
        **start: Any,
    ) -> None:
        self.engine, self.ep_size, self.num_layers, self.model_name = engine, ep_size, num_layers, model_name
        self.num_experts, self.top_k = 2 * ep_size, 2
        self.incarnation = uuid.uuid4().hex
        self.start = self.live = Settings.parse(start)
        self.held_revision = self.live_revision = self.live_since_step = 0
        self.last_apply_error = ""
        self.errors: dict[str, int] = {}
        self.phase_lend_s = 0.0002  # per step
        self.counting_s = 86400.0  # longer than any window
        self._held = self.live
        self.placement: PlacementOrder | None = None  # filled as soon as it is live
        self._held_placement = self.placement
        self.plans: deque[PlanSample] = deque(maxlen=MOST_PLANS)
        self._rng = np.random.default_rng(seed)
        self.seq = self.step_number = 0
        self.tokens_L = np.zeros(num_layers, dtype=np.int64)
        self.routed_LE = np.zeros((num_layers, self.num_experts), dtype=np.int64)
        self.computed_LR = np.zeros((num_layers, ep_size), dtype=np.int64)
        self.imbalance_LS, self.balancedness_LS = np.zeros((num_layers, 2)), np.zeros((num_layers, 2))
        self.lends_R = np.zeros(ep_size, dtype=np.int64)
        self.decisions: Counter[str] = Counter()

    @property
    def routed_LR(self) -> np.ndarray[Any, Any]:
        return self.routed_LE.reshape(self.num_layers, self.ep_size, 2).sum(axis=2)

    def take(self, directive: Directive) -> None:
        """Hold it; it goes live with the next step."""
        assert directive.engine == self.engine
        if directive.revision > self.held_revision:
            self.held_revision, self._held = directive.revision, Settings.parse(directive.settings)
            self._held_placement = directive.placement

    def step(self, tokens: int = 100) -> None:
        """One forward pass; in mode active every layer is evened out."""
        if self.live_revision < self.held_revision:
            self.live, self.live_revision = self._held, self.held_revision
            self.placement = self._held_placement
            self.live_since_step = self.step_number
        self.step_number += 1
        for layer in range(self.num_layers):
            self._run_layer(layer, tokens)

    def _run_layer(self, layer: int, tokens: int) -> None:
        weights = np.r_[[0.45, 0.45], np.full(self.num_experts - 2, 0.1 / (self.num_experts - 2))]
        counts_E = self._rng.multinomial(tokens * self.top_k, weights)
        routed_R = counts_E.reshape(self.ep_size, 2).sum(axis=1)
        computed_R = routed_R
        if self.live.mode is Mode.ACTIVE:
            computed_R = np.diff(np.linspace(0, counts_E.sum(), self.ep_size + 1).astype(np.int64))
            self.lends_R += np.arange(self.ep_size) > 0
            self._sample_plan(layer, tokens, routed_R, computed_R)
        self.decisions["lend" if self.live.mode is Mode.ACTIVE else "off"] += 1
        self.tokens_L[layer] += tokens
        self.routed_LE[layer] += counts_E
        self.computed_LR[layer] += computed_R
        ratios = imbalance_ratio(routed_R), imbalance_ratio(computed_R)
        self.imbalance_LS[layer] += ratios
        self.balancedness_LS[layer] += [1 / ratio for ratio in ratios]

    def _sample_plan(self, layer: int, tokens: int, routed_R: Any, computed_R: Any) -> None:
        self.plans.append(
            PlanSample(
                id=(self.plans[-1].id if self.plans else 0) + 1,
                step=self.step_number,
                layer=layer,
                phase="prefill",
                time_s=time.time(),
                decision="lend",
                tokens=tokens,
                routed_R=tuple(routed_R.tolist()),
                computed_R=tuple(computed_R.tolist()),
                lends=((0, 0, 1, 10),),
                predicted_gain_s=0.0,
                layer_seconds=0.001,
            )
        )

    def reports(self) -> list[Report]:
        self.seq += 1
        return [self.report(rank) for rank in range(self.ep_size)]

    def report(self, rank: int) -> Report:
        return Report(
            protocol=PROTOCOL,
            info=self.info(),
            rank=rank,
            incarnation=self.incarnation,
            seq=self.seq,
            time_s=time.time(),
            counting_s=self.counting_s,
            step=self.step_number,
            steps={"prefill": self.step_number, "decode": 0},
            held_revision=self.held_revision,
            live_revision=self.live_revision,
            live_settings=self.live.dump(),
            live_since_step=self.live_since_step,
            live_since_time_s=time.time(),
            last_apply_error=self.last_apply_error,
            phase_seconds={"prefill": {phase: self._seconds(phase) for phase in LAYER_PHASES}},
            live_placement=self.placement.number if self.placement else 0,
            filled_placement=0,
            layer_seconds={"prefill": 0.001 * self.step_number, "decode": 0.0},
            worth={phase: Worth() for phase in STEP_PHASES},
            device_total_bytes=16 << 30,
            device_free_bytes=8 << 30,
            memory_budget_bytes=4 * BYTES_PER_SLOT,
            memory_used_bytes=rank * BYTES_PER_SLOT,
            memory_peak_bytes=rank * BYTES_PER_SLOT,
            replica_bytes=0,
            errors=self.errors,
            group=self._group() if rank == 0 else None,
        )

    def _seconds(self, phase: str) -> Histogram:
        seconds = {"lend": self.phase_lend_s, "compute": 0.0005}.get(phase, 0.0)
        return Histogram((0,) * (len(SECONDS_BUCKETS) + 1), seconds * self.step_number)

    def info(self) -> EngineInfo:
        return EngineInfo(
            engine=self.engine,
            model_name=self.model_name,
            llep_version="0.1.0",
            vllm_version="0.32.0",
            backend="cpu",
            quantization="none",
            dtype="float32",
            ep_size=self.ep_size,
            tp_size=self.ep_size,
            dp_size=1,
            layer_numbers=tuple(range(self.num_layers)),
            num_experts=self.num_experts,
            top_k=self.top_k,
            slots_per_rank=4,
            bytes_per_slot=BYTES_PER_SLOT,
            replica_slots_per_rank=4,
            ranks_per_node=0,
            max_model_len=1024,
            settings=self.start.dump(),
            setting_sources=dict.fromkeys(Settings.model_fields, "environment"),
        )

    def _group(self) -> GroupLoads:
        layer_steps_L = np.full(self.num_layers, self.step_number, dtype=np.int64)
        histogram = Histogram((*(0 for _ in IMBALANCE_BUCKETS), int(layer_steps_L.sum())), 0.0)
        lends_RK = np.stack((self.lends_R, np.zeros_like(self.lends_R)), axis=1)
        homes_E = np.arange(self.num_experts) // 2
        return GroupLoads(
            tokens_PL=_in_prefill(self.tokens_L),
            routed_PLE=_in_prefill(self.routed_LE),
            routed_PLR=_in_prefill(self.routed_LR),
            computed_PLR=_in_prefill(self.computed_LR),
            layer_steps_PL=_in_prefill(layer_steps_L),
            imbalance_sum_PLS=_in_prefill(self.imbalance_LS),
            balancedness_sum_PLS=_in_prefill(self.balancedness_LS),
            imbalance_histograms=(histogram, histogram),
            decisions={"prefill": dict(self.decisions)},
            spilled_in_PR=_in_prefill(10 * self.lends_R),
            spilled_out_PR=_in_prefill(10 * self.lends_R),
            lends_PL=_in_prefill(np.full(self.num_layers, self.lends_R.sum() // self.num_layers)),
            lends_in_PRK=_in_prefill(lends_RK),
            lends_out_PRK=_in_prefill(lends_RK),
            bytes_per_lend=BYTES_PER_SLOT,
            predicted_gain_s={},
            last_plan_time_s=time.time(),
            home_rank_LE=Array.of(np.tile(homes_E, (self.num_layers, 1)).astype(np.int16)),
            plans=tuple(self.plans),
        )


def _in_prefill(values: np.ndarray[Any, Any]) -> Array:
    """[...], all of it counted in prefill, as [P, ...]."""
    return Array.of(np.stack((values, np.zeros_like(values))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--status", type=Path, required=True, help="file that says how far it is")
    parser.add_argument("--agent", action="store_true", help="start the agent too, and again whenever it ends")
    arguments, rest = parser.parse_known_args()
    start = {key.lstrip("-"): json.loads(value) for key, value in zip(rest[::2], rest[1::2], strict=True)}
    run(Workers(arguments.engine, **start), arguments.socket, arguments.status, has_agent=arguments.agent)


class Ranks:
    """All ranks of one engine in this process, each with what a vLLM worker has: agreed settings and a courier."""

    def __init__(self, workers: Workers, socket: str, *, has_agent: bool) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._agreed = [AgreedSettings(workers.start) for _ in range(workers.ep_size)]
        self._replicas: Any = SimpleNamespace(live_number=0)
        self._seqs = [0] * workers.ep_size
        self.num_reports_to_fail = 0
        for rank, agreed in enumerate(self._agreed):
            agent = AgentProcess(socket, workers.engine) if has_agent and rank == 0 else None
            Courier(socket, partial(self._report, rank), agreed, self._replicas, agent).start()

    def step(self) -> None:
        workers = self._workers
        with self._lock:
            number = workers.step_number + 1
            said = [agreed.header(number, 100, is_dummy=False, is_prefill=True) for agreed in self._agreed]
            for agreed in self._agreed:
                agreed.agree(np.stack(said))
            live = self._agreed[0].live
            if live.number > workers.live_revision:
                workers.take(
                    Directive(
                        protocol=PROTOCOL,
                        engine=workers.engine,
                        revision=live.number,
                        settings=live.settings.dump(),
                        placement=live.placement,
                    )
                )
                self._replicas.live_number = live.placement.number if live.placement else 0
            workers.step()

    def _report(self, rank: int) -> Report:
        if self.num_reports_to_fail:
            self.num_reports_to_fail -= 1
            raise RuntimeError("a report that fails, for a test")
        with self._lock:
            self._seqs[rank] += 1
            agreed = self._agreed[rank]
            report = self._workers.report(rank)
            held, error = agreed.held.number, agreed.last_error
            return msgspec.structs.replace(report, seq=self._seqs[rank], held_revision=held, last_apply_error=error)


def run(workers: Workers, socket: str, status: Path, *, has_agent: bool) -> None:
    ranks = Ranks(workers, socket, has_agent=has_agent)

    def fail_reports(*_: Any) -> None:
        ranks.num_reports_to_fail = 2 * workers.ep_size

    signal.signal(signal.SIGUSR1, fail_reports)
    parent = os.getppid()
    while os.getppid() == parent:
        ranks.step()
        _write(status, workers)
        time.sleep(STEP_S)


def _write(status: Path, workers: Workers) -> None:
    found = {"step": workers.step_number, "revision": workers.live_revision, "mode": workers.live.mode}
    new = status.with_suffix(".new")
    new.write_text(json.dumps({**found, "settings": workers.live.dump()}))
    new.replace(status)


if __name__ == "__main__":
    main()
