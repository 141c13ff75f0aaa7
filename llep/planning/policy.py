"""What the settings say about one layer of one step: leave it to plain EP, or ask the planner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llep.config import Mode, Phases, Planner, Settings, layer_numbers
from llep.cost import CostModel
from llep.placement import Placement
from llep.plan import Decision, Plan
from llep.planning import PlanOptions, plan_step
from llep.planning.home import plan_home


@dataclass(frozen=True, slots=True)
class Step:
    """What all ranks know of a forward pass before its first layer. tokens: real tokens over all ranks."""

    phase: str
    tokens: int


def may_plan(settings: Settings, step: Step, layer_number: int) -> Decision | None:
    """Why this layer is left to plain EP whatever its loads are, or None if the planner is asked."""
    if settings.mode in (Mode.OFF, Mode.OBSERVE) or settings.phases not in (Phases.BOTH, step.phase):
        return Decision.OFF
    chosen = layer_numbers(settings.layers)
    if chosen is not None and layer_number not in chosen:
        return Decision.OFF
    return Decision.SMALL_BATCH if step.tokens < settings.min_batch_tokens else None


def plans_replicas(settings: Settings, layer_number: int, placement: Placement) -> bool:
    """Whether resident replicas act in this layer, also where may_plan leaves it alone for its size or phase."""
    chosen = layer_numbers(settings.layers)
    return (
        bool(placement.replicas)
        and settings.mode in (Mode.SHADOW, Mode.ACTIVE)
        and settings.planner is not Planner.HOME
        and (chosen is None or layer_number in chosen)
    )


def needs_counts(settings: Settings, step: Step, layer_number: int, placement: Placement) -> bool:
    """Whether the plan may differ from plain EP: then all ranks must plan from the same counts."""
    return may_plan(settings, step, layer_number) is None or plans_replicas(settings, layer_number, placement)


def decide(
    settings: Settings,
    step: Step,
    layer_number: int,
    counts_RE: npt.NDArray[np.int64],
    placement: Placement,
    bytes_per_expert: int,
    ranks_per_node: int | None = None,
    cost_model: CostModel | None = None,
    is_probe: bool = False,
) -> Plan:
    """The plan of one layer: the same on every rank that holds the same counts, settings and cost model.

    Where a step is too small or of another phase, only the placement acts: resident replicas share the load, nothing
    is lent, and planning, done by then, is not charged. is_probe: what would lend is left to plain EP instead, as a
    measure of what lending is worth.
    """
    reason = may_plan(settings, step, layer_number)
    if reason is not None:
        if plans_replicas(settings, layer_number, placement):
            options = PlanOptions(
                imbalance_threshold=settings.imbalance_threshold,
                capacity_factor=settings.capacity_factor,
                min_chunk_tokens=1,
                bytes_per_expert=bytes_per_expert,
                ranks_per_node=ranks_per_node,
                phase="decode",
                cost_model=cost_model and cost_model.already_planned,
            )
            plan = plan_step(settings.planner.value, counts_RE, placement.without_slots, options)
            if plan.decision is Decision.REPLICA:
                return plan
        return plan_home(counts_RE.sum(axis=0).tolist(), placement, reason)
    options = PlanOptions(
        imbalance_threshold=settings.imbalance_threshold,
        capacity_factor=settings.capacity_factor,
        min_chunk_tokens=settings.min_chunk_tokens,
        bytes_per_expert=bytes_per_expert,
        max_lend_bytes=settings.max_lend_bytes_per_layer,
        ranks_per_node=ranks_per_node,
        lend_scope=settings.lend_scope.value,
        phase="prefill" if step.phase == "prefill" else "decode",
        cost_model=cost_model,
    )
    plan = plan_step(settings.planner.value, counts_RE, placement, options)
    return plan_home(counts_RE.sum(axis=0).tolist(), placement, Decision.PROBE) if is_probe and plan.lends else plan
