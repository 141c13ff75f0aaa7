"""Step planners: pure functions from one batch's counts to a plan, behind `plan_step`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llep.cost import predict_s
from llep.errors import SettingsError
from llep.placement import Placement
from llep.plan import Decision, Plan
from llep.planning.home import plan_home
from llep.planning.least_loaded import plan_least_loaded
from llep.planning.options import PlanOptions
from llep.planning.quota import plan_quota

__all__ = ["PLANNERS", "PlanOptions", "plan_step"]

Counts = npt.NDArray[np.int64]


def plan_step(planner: str, counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    """The plan of one layer and one batch; the same on every rank that passes the same arguments.

    counts_RE[r, e] = token-expert pairs routed from rank r's tokens to expert e, integers >= 0. Raises SettingsError
    for an unknown planner, ValueError for counts or limits that do not fit the placement.
    """
    plan = PLANNERS.get(planner)
    if plan is None:
        raise SettingsError(f"planner={planner!r} is unknown; choose one of {', '.join(PLANNERS)}", param="planner")
    return plan(_checked(counts_RE, placement, options), placement, options)


def _home(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    return plan_home(counts_RE.sum(axis=0), placement)


def _least_loaded(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    plan = plan_least_loaded(counts_RE.sum(axis=0).tolist(), placement, options)
    return _if_it_pays(plan, counts_RE, options) if options.cost_model is not None else plan


def _if_it_pays(plan: Plan, counts_RE: Counts, options: PlanOptions) -> Plan:
    assert options.cost_model is not None
    home = plan_home(counts_RE.sum(axis=0), plan.placement, Decision.NO_GAIN)
    if plan.decision not in (Decision.LEND, Decision.REPLICA):
        return plan
    home_s, plan_s = (predict_s(each, options.cost_model, options.bytes_per_expert) for each in (home, plan))
    plan.predicted_gain_s = home_s - plan_s
    return plan if plan_s < home_s else home


PLANNERS: dict[str, Callable[[Counts, Placement, PlanOptions], Plan]] = {
    "quota": plan_quota,
    "least_loaded": _least_loaded,
    "home": _home,
}


def _checked(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Counts:
    """Counts as int64, or ValueError naming the first thing that is wrong."""
    counts = np.asarray(counts_RE)
    shape = (placement.ep_size, placement.num_experts)
    if counts.shape != shape:
        raise ValueError(f"counts must have shape (ranks, experts) = {shape} as the placement has, got {counts.shape}")
    if counts.dtype.kind not in "iu":
        raise ValueError(f"counts must be integers, got dtype {counts.dtype}")
    if counts.size and counts.min() < 0:
        rank, expert = np.unravel_index(int(counts.argmin()), counts.shape)
        raise ValueError(f"counts must be >= 0, got {counts.min()} from rank {rank} to expert {expert}")
    if options.free_bytes is not None and len(options.free_bytes) != placement.ep_size:
        raise ValueError(
            f"free_bytes must have one entry per rank ({placement.ep_size}), got {len(options.free_bytes)}"
        )
    return counts.astype(np.int64, copy=False)
