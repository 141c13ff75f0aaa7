"""Which resident replicas an engine should have, and whether the change is worth its cost. Pure.

The planner (llep.planning.replicas) says which copies lower the ranks' highest loads, surely and most per byte; here it
is asked with what the engine has room for, and its answer is weighed in seconds: what is saved over the next HORIZON_S
against what moving the weights costs.

Shape letters: P phases of steps (prefill, decode), L layers, R ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.config import Mode
from llep.planning.replicas import Forecast, Replica, ReplicaLimits, ReplicaPlan, plan_replicas
from llep.scheduler.decide import Decision, numbers_of
from llep.scheduler.evidence import Evidence

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

HORIZON_S = 600.0  # hot experts are believed to stay for so long
MARGIN = 2.0  # what is saved must be so many times what moving costs
SMALLEST_SAVING = 0.02  # of the time inside layers, as for advice
LONGEST_MOVE_S = 120.0  # a change that takes longer is cut short; the rest follows in the next
FEWEST_ROUNDS = 1.5  # of decide_every_s, that a placement is watched before it is changed: the second round after it
NOISE_SIGMAS = 4.0  # a gain is believed from so many standard errors on: asked every 10 s, 2 would err daily
HEADROOM_RATIO = 0.02  # of a device's memory that stays free
NO_ROOM = (
    "no room for resident replicas: replica_slots_per_rank is 0 on this engine, and is set at start "
    "(the number of its MoE layers is a good start)"
)
UNMEASURED_BYTES_PER_S = 1e9  # until a lend has been timed, without a cost model


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a placement is planned on: an engine's forecast, what it has now, and its limits."""

    forecast: Forecast
    home_rank_LE: Ids
    present: tuple[Replica, ...]
    room_R: tuple[int, ...]  # copies that each rank has room for, the present ones counted in
    bytes_per_expert: int
    bytes_per_s: int  # most that one rank moves
    lends_L: Floats  # in the window
    evidence: Evidence

    @property
    def has_room(self) -> bool:
        return any(self.room_R)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A placement and what it is worth over horizon_s."""

    plan: ReplicaPlan
    before: float | None  # forecast imbalance ratio, mean over layers
    after: float | None
    move_bytes: int
    move_s: float
    cost_s: float
    saving_s: float
    lend_cut_ratio: float  # share of the lends that become needless
    is_worth_it: bool
    reason: str
    horizon_s: float = HORIZON_S

    @property
    def has_changes(self) -> bool:
        return bool(self.plan.added or self.plan.dropped)


def suggest_with_room(ground: Ground) -> Suggestion:
    """What an engine without room would have had from a slot on each rank for every layer."""
    return suggest(replace(ground, room_R=(len(ground.home_rank_LE),) * len(ground.room_R)))


def suggest(ground: Ground) -> Suggestion:
    """The best placement within room and speed, weighed. Raises ValueError where the ground contradicts itself."""
    size = max(ground.bytes_per_expert, 1)
    most_added = max(int(ground.bytes_per_s * LONGEST_MOVE_S // size), 1) * len(ground.room_R)
    limits = ReplicaLimits(
        budget_bytes=tuple(room * size for room in ground.room_R),
        bytes_per_expert=size,
        max_added=most_added,
        noise_sigmas=NOISE_SIGMAS,
    )
    return weigh(ground, plan_replicas(ground.forecast, ground.home_rank_LE, ground.present, limits))


def weigh(ground: Ground, plan: ReplicaPlan) -> Suggestion:
    """What a placement saves and costs, in seconds of the engine's time inside MoE layers."""
    evidence = ground.evidence
    added_R = np.bincount([copy.rank for copy in plan.added], minlength=len(ground.room_R))
    most_bytes = int(added_R.max(initial=0)) * ground.bytes_per_expert
    move_s = most_bytes / max(ground.bytes_per_s, 1)
    cost_s = most_bytes * _second_per_byte(evidence)
    weights_L = ground.forecast.pairs_WL.sum(axis=0) if len(ground.forecast.pairs_WL) else np.zeros(0)
    before, after = (_mean(ratios, weights_L) for ratios in (plan.imbalance_before_L, plan.imbalance_after_L))
    cut = _lend_cut(ground, plan)
    per_window_s = _compute_saving(evidence, before, after) + evidence.phase_seconds.get("lend", 0.0) * cut
    useful_s = max(HORIZON_S - move_s, 0.0)
    saving_s = per_window_s * useful_s / evidence.window_s if evidence.window_s > 0 else 0.0
    least_s = SMALLEST_SAVING * evidence.layer_seconds * HORIZON_S / evidence.window_s if evidence.window_s > 0 else 0.0
    is_worth_it = bool(plan.added) and saving_s > 0 and saving_s >= max(MARGIN * cost_s, least_s)
    return Suggestion(
        plan=plan,
        before=before,
        after=after,
        move_bytes=len(plan.added) * ground.bytes_per_expert,
        move_s=move_s,
        cost_s=cost_s,
        saving_s=saving_s,
        lend_cut_ratio=cut,
        is_worth_it=is_worth_it,
        reason=_why(ground, plan, saving_s, cost_s, least_s, cut),
    )


def decide_placement(ground: Ground, *, is_filling: bool) -> tuple[Decision, Suggestion | None]:
    """Order new replicas (outcome order), show them (suggest), or leave all as it is.

    The caller has seen to it that replicas isn't off, and that the evidence is of the present placement alone.
    """
    settings = ground.evidence.settings
    if not ground.has_room:
        return _decision("no_room", NO_ROOM), None
    overfull = is_overfull(ground)
    if not overfull:
        if is_filling:
            return _decision("filling", "the placement ordered last is still being filled"), None
        left_s = FEWEST_ROUNDS * settings.decide_every_s - ground.evidence.window_s
        if left_s > 0.0:
            return _decision("cooling_down", f"what is there has not been watched enough: {left_s:.0f} s to go"), None
        if ground.evidence.layer_steps <= 0:
            return _decision("idle", "no step in the window"), None
    found = suggest(ground)
    inputs = {
        **numbers_of(ground.evidence),
        **placement_numbers(found),
        "windows": len(ground.forecast.share_WLE),
        "changed_windows_ago": ground.forecast.changed_windows_ago,
        "present": len(ground.present),
        "added": [list(copy) for copy in found.plan.added[:64]],
        "dropped": [list(copy) for copy in found.plan.dropped[:64]],
    }
    gain = found.saving_s / _horizon_seconds(ground.evidence) if _horizon_seconds(ground.evidence) > 0 else None
    if not found.has_changes:
        outcome = "nothing"
    elif not (found.is_worth_it or overfull):
        outcome = "not_worth_it"
    elif settings.replicas == "apply" and settings.mode is Mode.ACTIVE:
        outcome = "order"
    else:
        outcome = "suggest"
    decision = Decision(kind="placement", outcome=outcome, reason=found.reason, inputs=inputs, expected_gain_ratio=gain)
    return decision, found


def placement_numbers(found: Suggestion) -> dict[str, Any]:
    return {
        "forecast_ratio_before": _rounded(found.before),
        "forecast_ratio_after": _rounded(found.after),
        "move_bytes": found.move_bytes,
        "move_s": round(found.move_s, 3),
        "cost_s": round(found.cost_s, 4),
        "saving_s": round(found.saving_s, 4),
        "lend_cut_ratio": round(found.lend_cut_ratio, 4),
        "horizon_s": found.horizon_s,
    }


def room(
    slots_per_rank: int, held_R: Sequence[int], free_R: Sequence[int], total_R: Sequence[int], size: int
) -> tuple[int, ...]:
    """Copies each rank has room for: its slots, and what live memory leaves above the headroom.

    held_R: copies that are there already. A rank whose memory is not known (total 0) has its slots.
    """
    found = []
    for held, free, total in zip(held_R, free_R, total_R, strict=True):
        left = max(free - HEADROOM_RATIO * total, 0.0) // max(size, 1) if total else slots_per_rank
        found.append(int(min(slots_per_rank, held + left)))
    return tuple(found)


def refusal(
    replicas: Iterable[tuple[int, int, int]], home_rank_LE: npt.NDArray[Any], room_R: Sequence[int]
) -> str | None:
    """Why these replicas (place of the layer, expert, rank) don't fit, the rule's name first; None if they do."""
    replicas = list(replicas)
    num_layers, num_experts = home_rank_LE.shape
    for layer, expert, rank in replicas:
        for name, value, count in (
            ("layer", layer, num_layers),
            ("expert", expert, num_experts),
            ("rank", rank, len(room_R)),
        ):
            if not 0 <= value < count:
                return f"unknown_{name}: {name} place {value} is not between 0 and {count - 1}"
        if home_rank_LE[layer, expert] == rank:
            return f"home_rank: expert {expert} of layer place {layer} is at home on rank {rank} already"
    if len(set(replicas)) < len(replicas):
        return "twice: a replica is given more than once; one copy per rank is enough"
    used_R = np.bincount([rank for _, _, rank in replicas], minlength=len(room_R))
    for rank, (used, room_of_rank) in enumerate(zip(used_R.tolist(), room_R, strict=True)):
        if used > room_of_rank:
            return f"no_room: {used} copies on rank {rank}, which has room for {room_of_rank}"
    return None


def is_overfull(ground: Ground) -> bool:
    """Whether a rank has more copies than it has room for."""
    held_R = np.bincount([copy.rank for copy in ground.present], minlength=len(ground.room_R))
    return bool((held_R > np.array(ground.room_R)).any())


def _second_per_byte(evidence: Evidence) -> float:
    """Of one rank's link: as measured by lending, else as calibrated, else a guess."""
    bytes_per_rank = evidence.lend_bytes / evidence.ep_size
    lend_s = evidence.phase_seconds.get("lend", 0.0)
    if bytes_per_rank > 0 and lend_s > 0:
        return lend_s / bytes_per_rank
    if evidence.cost_model is None:
        return 1.0 / UNMEASURED_BYTES_PER_S
    model = evidence.cost_model
    return 1.0 / (model.node_link if evidence.is_one_node else model.network_link).bytes_per_s


def _compute_saving(evidence: Evidence, before: float | None, after: float | None) -> float:
    """Seconds of the window by which the replicas would shorten steps that lending leaves unbalanced.

    before, after: the forecast ratios. A step is above them by chance, and that no placement cures.
    """
    if before is None or after is None:
        return 0.0
    saved_s = 0.0
    for seconds, now in zip(evidence.layer_seconds_P.tolist(), evidence.after_P.tolist(), strict=True):
        if now > 1.0 and before > after:  # nan is not
            curable = min(now, before) - 1.0
            saved_s += seconds * evidence.compute_share * curable / now * (before - after) / (before - 1.0)
    return saved_s


def _lend_cut(ground: Ground, plan: ReplicaPlan) -> float:
    """Share of the lends that become needless: by layer, as the excess over the mean load becomes less.

    Below the threshold nothing is lent for what the forecast knows: such lends are chance's, and go on.
    """
    threshold = ground.evidence.settings.imbalance_threshold
    need_before_L, need_after_L = (
        np.where(np.array(ratios) > threshold, np.array(ratios) - 1.0, 0.0)
        for ratios in (plan.imbalance_before_L, plan.imbalance_after_L)
    )
    cut_L = np.where(need_before_L > 0, 1.0 - need_after_L / np.maximum(need_before_L, 1e-12), 0.0)
    total = float(ground.lends_L.sum())
    return float((np.maximum(cut_L, 0.0) * ground.lends_L).sum()) / total if total > 0 else 0.0


def _why(ground: Ground, plan: ReplicaPlan, saving_s: float, cost_s: float, least_s: float, cut: float) -> str:
    if not plan.added and not plan.dropped:
        windows, changed = len(ground.forecast.share_WLE), ground.forecast.changed_windows_ago
        by = f"{windows} window{'s'[: windows > 1]}" + (
            f" (loads changed {changed} ago)" if changed is not None else ""
        )
        return f"no copy surely lowers the highest load, by {by}: nothing is moved"
    what = f"{len(plan.added)} copies added, {len(plan.dropped)} dropped: saves {saving_s:.3g} s of {HORIZON_S:.0f} s"
    what += f" ({100 * cut:.0f}% of the lends), costs {cost_s:.3g} s"
    if saving_s < least_s:
        return f"{what}; less than {100 * SMALLEST_SAVING:g}% of the time in MoE layers"
    return what if saving_s >= MARGIN * cost_s else f"{what}; it should save {MARGIN:g} times what it costs"


def _horizon_seconds(evidence: Evidence) -> float:
    return evidence.layer_seconds * HORIZON_S / evidence.window_s if evidence.window_s > 0 else 0.0


def _mean(ratios: Sequence[float], weights_L: Floats) -> float | None:
    if not len(ratios) or weights_L.sum() <= 0:
        return None
    return float(np.average(np.array(ratios), weights=weights_L))


def _decision(outcome: str, reason: str) -> Decision:
    return Decision(kind="placement", outcome=outcome, reason=reason, inputs={})


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
