"""What resident replicas, decided as the scheduler decides them, save of lending: a simulated engine and its scheduler.

Steps of generated or natural loads are planned by the quota planner, with the replicas that are switched on; the cost
model of an H200 says how long they take. Their counts go to the scheduler's windows as real Reports, and every 10 s its
placement decision is asked; an order is on after its weights have moved. Next to it the same steps with lending alone.
One JSON line a case.

    python -m bench.scheduler.traces [--append]
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.record import add_record
from bench.scheduler.engines import SimulatedEngine, as_reports
from llep.config import Settings
from llep.cost import PRESETS, CostModel, predict_s
from llep.generate import Workload, generate_steps
from llep.loads import imbalance_ratio
from llep.moe.layer import PhaseTimes
from llep.moe.window import LayerStep, LoadWindow
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step, warm_up
from llep.planning.home import plan_home
from llep.planning.replicas import Replica
from llep.scheduler.decide_placement import decide_placement
from llep.scheduler.show_loads import ground_of
from llep.scheduler.windows import Windows
from llep.shapes import SHAPES, ModelShape, split_sources
from llep.traces import Trace

STEP_S = 0.5
DECIDE_EVERY_S = 10.0
TRACES = Path(__file__).parents[1] / "natural" / "traces"
Steps = Iterable[np.ndarray[Any, Any]]  # counts [L, R, E], one after the other


class Loop:
    """One engine that steps, and the scheduler that hears it. Time is simulated."""

    def __init__(self, shape: ModelShape, ranks: int, *, has_replicas: bool, model: CostModel) -> None:
        self._shape, self._ranks, self._model, self._has_replicas = shape, ranks, model, has_replicas
        self._settings = Settings(replicas="apply", min_chunk_tokens=64)
        self._plain = Placement.linear(shape.num_experts, ranks, 4)
        self._placements = [self._plain] * shape.num_layers
        engine = SimulatedEngine(
            "traced", ranks=ranks, layers=shape.num_layers, experts=shape.num_experts, top_k=shape.top_k
        )
        info = msgspec.structs.replace(
            engine.info, bytes_per_slot=shape.bytes_per_expert, settings=self._settings.dump(), cost_model=model
        )
        self._templates = [
            msgspec.structs.replace(report, info=info, live_settings=self._settings.dump(), counting_s=0.0)
            for report in as_reports(engine)
        ]
        homes_LE = np.tile(self._plain.home_rank_E, (shape.num_layers, 1))
        self._window = LoadWindow(homes_LE, ranks, shape.top_k, shape.bytes_per_expert)
        self._steps = self._seq = 0
        self._windows = Windows()
        self._options = PlanOptions(
            imbalance_threshold=self._settings.imbalance_threshold,
            min_chunk_tokens=self._settings.min_chunk_tokens,
            bytes_per_expert=shape.bytes_per_expert,
            cost_model=model,
        )
        self._present: tuple[Replica, ...] = ()
        self._live_placement = 0
        self._coming: tuple[float, tuple[Replica, ...]] | None = None
        self.lends = self.moved = self.layer_steps = self.orders = 0
        self.ratio_sum = self.seconds = 0.0
        self.outcomes: dict[str, int] = {}

    def run(self, steps: Steps) -> None:
        for number, counts_LRE in enumerate(steps):
            now_s = number * STEP_S
            self._step(counts_LRE)
            if now_s % 1.0 == 0.0:
                self._report(now_s)
            if self._has_replicas and now_s % DECIDE_EVERY_S == 0.0 and now_s > 0:
                self._decide(now_s)
            if self._coming is not None and now_s >= self._coming[0]:
                self._switch(self._coming[1])
                self._live_placement = self.orders

    def _step(self, counts_LRE: np.ndarray[Any, Any]) -> None:
        for layer, counts_RE in enumerate(counts_LRE):
            counts_RE = split_sources(counts_RE, self._ranks)
            plan = plan_step("quota", counts_RE, self._placements[layer], self._options)
            home = plan_home(counts_RE.sum(axis=0), self._plain)
            seconds = predict_s(plan, self._model, self._shape.bytes_per_expert)
            lent_s = len(plan.lends) / self._ranks * self._shape.bytes_per_expert / self._model.node_link.bytes_per_s
            times = PhaseTimes()
            times.seconds.update(lend=lent_s, compute=max(seconds - lent_s, 0.0))
            self._window.record(
                LayerStep(
                    step=self._steps,
                    phase="prefill",
                    layer=layer,
                    counts_RE=counts_RE,
                    planned=plan,
                    home_loads=home.rank_loads,
                    is_moved=True,
                    is_verified=False,
                    times=times,
                    seconds=seconds,
                )
            )
            self.lends += len(plan.lends)
            self.ratio_sum += imbalance_ratio(plan.rank_loads)
            self.seconds += seconds
            self.layer_steps += 1
        self._steps += 1

    def _report(self, now_s: float) -> None:
        self._seq += 1
        for template in self._templates:
            report = msgspec.structs.replace(
                template,
                seq=self._seq,
                step=self._steps,
                steps={"prefill": self._steps, "decode": 0},
                counting_s=now_s,
                live_placement=self._live_placement,
                phase_seconds=self._window.phase_seconds(),
                layer_seconds=dict(self._window.layer_seconds),
                worth=self._window.worth(),
                group=self._window.group_loads() if template.rank == 0 else None,
            )
            self._windows.take(report, now_s)

    def _decide(self, now_s: float) -> None:
        engine = self._windows.engines["traced"]
        room_R = (engine.info.replica_slots_per_rank,) * self._ranks
        ground = ground_of(engine, self._settings, self._present, room_R, now_s)
        decision, found = decide_placement(ground, is_filling=self._coming is not None)
        self.outcomes[decision.outcome] = self.outcomes.get(decision.outcome, 0) + 1
        if decision.outcome == "order" and found is not None:
            self.moved += len(found.plan.added)
            self.orders += 1
            kept = set(self._present) & set(found.plan.replicas)
            self._switch(tuple(sorted(kept)))  # what is dropped goes at once
            self._coming = (now_s + max(found.move_s, STEP_S), found.plan.replicas)

    def _switch(self, replicas: tuple[Replica, ...]) -> None:
        self._present, self._coming = replicas, None
        self._placements = [
            replace(self._plain, replicas=tuple((e, r) for at, e, r in replicas if at == layer))
            for layer in range(self._shape.num_layers)
        ]


def staying(shape: ModelShape, ranks: int, stay_s: float, seconds: float) -> Steps:
    """Zipf popularity, of other experts after every stay_s; they lie where their ranks have twice the mean load."""
    for epoch in range(math.ceil(seconds / stay_s)):
        yield from (
            step.counts_LRE
            for step in generate_steps(
                Workload.parse("zipf:ratio=2"),
                shape,
                num_ranks=ranks,
                tokens_per_rank=4096,
                steps=max(int(stay_s / STEP_S), 1),
                seed=epoch,
            )
        )


def natural(name: str, seconds: float) -> Steps:
    """A natural trace, again and again."""
    recording = [step.counts_LRE for step in Trace(TRACES / name).steps()]
    yield from itertools.islice(itertools.cycle(recording), int(seconds / STEP_S))


def measure(name: str, shape: ModelShape, ranks: int, steps: Callable[[], Steps]) -> dict[str, Any]:
    model = PRESETS["h200"]
    with_replicas, alone = (
        Loop(shape, ranks, has_replicas=has_replicas, model=model) for has_replicas in (True, False)
    )
    for loop in (with_replicas, alone):
        loop.run(steps())
    ratio, ratio_alone = (loop.ratio_sum / loop.layer_steps for loop in (with_replicas, alone))
    return {
        "bench": "traces",
        "trace": name,
        "model": shape.name,
        "layers": shape.num_layers,
        "ranks": ranks,
        "steps": with_replicas.layer_steps // shape.num_layers,
        "lends_alone": alone.lends,
        "lends": with_replicas.lends,
        "lent_bytes_cut_ratio": round(1.0 - with_replicas.lends / alone.lends, 4) if alone.lends else None,
        "imbalance_ratio_alone": round(ratio_alone, 4),
        "imbalance_ratio": round(ratio, 4),
        "copies_moved": with_replicas.moved,
        "orders": with_replicas.orders,
        "predicted_time_ratio": round(with_replicas.seconds / alone.seconds, 4),
        "outcomes": with_replicas.outcomes,
    }


def cases(seconds: float) -> Iterator[tuple[str, ModelShape, int, Callable[[], Steps]]]:
    shape = replace(SHAPES["gpt-oss-120b"], layer_numbers=tuple(range(4)))
    for name, stay_s in (("hot experts stay for 20 minutes", 1200.0), ("hot experts stay for 5 minutes", 300.0)):
        yield name, shape, 8, lambda stay_s=stay_s: staying(shape, 8, stay_s, seconds)  # type: ignore[misc]
    yield "hot experts change every second", shape, 8, lambda: staying(shape, 8, 1.0, seconds / 4)
    small = ModelShape(
        name="natural",
        layer_numbers=tuple(range(4)),
        num_experts=32,
        top_k=4,
        bytes_per_expert=SHAPES["gpt-oss-20b"].bytes_per_expert,
    )
    for name in ("python-prefill", "mixed-prefill", "shifting-prefill"):
        yield f"natural: {name}", small, 8, lambda name=name: natural(name, seconds)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="of simulated time")
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    warm_up()
    assert DECIDE_EVERY_S == Settings().decide_every_s
    for case in cases(arguments.seconds):
        add_record("scheduler", measure(*case), append=arguments.append)


if __name__ == "__main__":
    main()
