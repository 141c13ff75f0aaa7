"""Replays recorded or generated loads under planners side by side: balance, lends, bytes, memory and predicted time.

Nothing here runs a model. Per layer and step a planner gets that batch's counts, as it would in a rank; what it decides
is judged by loads, and by a cost model where one is given. Memory does not grow with the number of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llep.shapes import ModelShape, StepCounts, split_sources
from llep.simulate.contenders import Planner, make_planner
from llep.simulate.judge import Judge
from llep.simulate.setup import Setup
from llep.simulate.tally import Tally

__all__ = ["Setup", "Simulation", "replay", "simulate", "summary"]


@dataclass(frozen=True)
class Simulation:
    """The outcome: one tally per planner, all over the same loads."""

    setup: Setup
    steps: int
    layer_steps: int
    tokens: int  # pairs over all layers and steps
    ideal_s: float | None  # predicted seconds were every batch balanced
    tallies: tuple[Tally, ...]


def simulate(
    steps: Iterable[StepCounts],
    setup: Setup,
    planners: Sequence[str],
    on_step: Callable[[int], None] = lambda step: None,
) -> Simulation:
    """Replay the steps under each planner. on_step is called after each with the number of steps so far.

    Counts with another number of source ranks are dealt to the setup's ranks (`shapes.split_sources`). SettingsError
    for an unknown planner or one that the setup rules out; ValueError for counts of another shape.
    """
    return replay(steps, setup, {name: make_planner(name, setup) for name in planners}, on_step)


def replay(
    steps: Iterable[StepCounts],
    setup: Setup,
    planners: Mapping[str, Planner],
    on_step: Callable[[int], None] = lambda step: None,
) -> Simulation:
    """The same for planners that are made already, by the name of their tally."""
    running = [(planner, Tally(name, setup)) for name, planner in planners.items()]
    judge = Judge(setup)
    number = layer_steps = tokens = 0
    ideal_s = 0.0 if setup.options.cost_model is not None else None
    for step in steps:
        _check(step, setup.shape)
        loads_LE = step.counts_LRE.sum(axis=1)
        busy = np.flatnonzero(loads_LE.any(axis=1)).tolist()
        for planner, tally in running:
            resident_R, ratios = planner.copies_LR.sum(axis=0), 0.0
            for layer in busy:
                counts_RE = split_sources(step.counts_LRE[layer], setup.num_ranks)
                start_s = time.perf_counter()
                plan = planner.plan(layer, counts_RE, loads_LE[layer], step.phase)
                tally.plan_us.add((time.perf_counter() - start_s) * 1e6)
                ratios += judge.judge(tally, layer, plan, resident_R, is_planned=planner.plans_batches(step.phase))
            if busy:
                tally.series.add(ratios / len(busy))
            planner.seen(loads_LE)
            tally.moved = planner.moved
        if ideal_s is not None:
            ideal_s += sum(judge.ideal_s(int(loads_LE[layer].sum())) for layer in busy)
        number += 1
        layer_steps += len(busy)
        tokens += int(loads_LE.sum())
        on_step(number)
    return Simulation(setup, number, layer_steps, tokens, ideal_s, tuple(tally for _, tally in running))


def _check(step: StepCounts, shape: ModelShape) -> None:
    layers, _, experts = step.counts_LRE.shape
    if (layers, experts) != (shape.num_layers, shape.num_experts):
        raise ValueError(
            f"step {step.step} has {layers} layers and {experts} experts; "
            f"{shape.name} has {shape.num_layers} and {shape.num_experts}"
        )


def summary(simulation: Simulation) -> dict[str, Any]:
    """The outcome as plain values for JSON; None where nothing was computed or no cost model was given."""
    setup = simulation.setup
    model = setup.options.cost_model
    return {
        "model": setup.shape.name,
        "layers": setup.shape.num_layers,
        "experts": setup.shape.num_experts,
        "ranks": setup.num_ranks,
        "ranks_per_node": setup.options.ranks_per_node,
        "slots_per_rank": setup.slots_per_rank,
        "bytes_per_expert": setup.bytes_per_expert,
        "cost_model": model.name if model else None,
        "steps": simulation.steps,
        "layer_steps": simulation.layer_steps,
        "tokens": simulation.tokens,
        "ideal_s_per_step": _per(simulation.ideal_s, simulation.steps),
        "planners": [_planner(tally, simulation) for tally in simulation.tallies],
    }


def _planner(tally: Tally, simulation: Simulation) -> dict[str, Any]:
    size, steps = simulation.setup.bytes_per_expert, simulation.steps
    is_timed = simulation.setup.options.cost_model is not None
    ratios = tally.ratios
    by_layer = np.where(tally.layer_steps_L > 0, tally.ratio_sum_L / np.maximum(tally.layer_steps_L, 1), np.nan)
    ideal_s = simulation.ideal_s
    return {
        "planner": tally.name,
        "imbalance_ratio": {
            "mean": _number(ratios.mean),
            "p50": _number(ratios.quantile(0.5)),
            "p95": _number(ratios.quantile(0.95)),
            "max": _number(ratios.highest if ratios.count else math.nan),
        },
        "decisions": dict(sorted(tally.decisions.items())),
        "spilled_tokens": int(tally.spilled_tokens),
        "lends": tally.lends,
        "lends_per_layer_step": _per(tally.lends, simulation.layer_steps),
        "most_lends_by_rank": tally.most_lends_R.tolist(),
        "lend_bytes": tally.lends * size,
        "moved_copies": tally.moved,
        "moved_bytes": tally.moved * size,
        "peak_memory_bytes_by_rank": tally.peak_bytes_R.tolist(),
        "predicted_s_per_step": _per(tally.predicted_s, steps) if is_timed else None,
        "ideal_time_ratio": _per(ideal_s, tally.predicted_s) if ideal_s is not None else None,
        "ideal_load_ratio": _per(tally.mean_tokens, tally.highest_tokens),
        "plan_us": {"p50": _number(tally.plan_us.quantile(0.5)), "p99": _number(tally.plan_us.quantile(0.99))},
        "imbalance_ratio_by_layer": {
            str(number): _number(ratio)
            for number, ratio in zip(simulation.setup.shape.layer_numbers, by_layer.tolist(), strict=True)
        },
        "imbalance_ratio_by_steps": {
            "steps_per_point": tally.series.width,
            "mean": [_number(mean) for mean in tally.series.means],
        },
    }


def _per(value: float | None, count: float) -> float | None:
    return value / count if value is not None and count else None


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
