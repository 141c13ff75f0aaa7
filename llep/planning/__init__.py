"""Step planners: pure functions from one batch's counts to a plan, behind `plan_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from llep.cost import predict_s
from llep.errors import SettingsError
from llep.placement import Placement
from llep.plan import Decision, Plan
from llep.planning.home import plan_home
from llep.planning.least_loaded import plan_least_loaded
from llep.planning.options import PlanOptions, refuse_counts
from llep.planning.quota import plan_quota

__all__ = ["PLANNERS", "PlanOptions", "plan_step", "warm_up"]

Counts = npt.NDArray[np.int64]
StepPlanner = Callable[[Counts, Placement, PlanOptions], Plan]


def plan_step(planner: str, counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    """The plan of one layer and one batch; the same on every rank that passes the same arguments.

    counts_RE[r, e] = token-expert pairs routed from rank r's tokens to expert e, integers >= 0. Raises SettingsError
    for an unknown planner, ValueError for counts or limits that do not fit the placement.
    """
    plan = PLANNERS.get(planner)
    if plan is None:
        raise SettingsError(f"planner={planner!r} is unknown; choose one of {', '.join(PLANNERS)}", param="planner")
    return plan(_checked(counts_RE, placement, options), placement, options)


def warm_up() -> bool:
    """Make plan_step use the compiled planners from now on: the same plans, sooner. Whether numba is there to do so.

    Takes half a minute once per machine and version, then about a second: call it at start, never in a request.
    """
    try:
        from llep.planning import native
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return False
    native.warm_up()
    PLANNERS["quota"] = native.plan_quota
    PLANNERS["least_loaded"] = partial(_least_loaded, native.plan_least_loaded)
    return True


def _quota(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    refuse_counts(counts_RE)
    return plan_quota(counts_RE, placement, options)


def _readable_least_loaded(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    refuse_counts(counts_RE)
    return plan_least_loaded(counts_RE.sum(axis=0).tolist(), placement, options)


def _least_loaded(plan_step: StepPlanner, counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    plan = plan_step(counts_RE, placement, options)
    return _if_it_pays(plan, counts_RE, options) if options.cost_model is not None else plan


def _home(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Plan:
    refuse_counts(counts_RE)
    return plan_home(counts_RE.sum(axis=0), placement)


def _if_it_pays(plan: Plan, counts_RE: Counts, options: PlanOptions) -> Plan:
    if plan.decision not in (Decision.LEND, Decision.REPLICA):
        return plan
    assert options.cost_model is not None
    home = plan_home(counts_RE.sum(axis=0), plan.placement, Decision.NO_GAIN)
    home_s, plan_s = (predict_s(each, options.cost_model, options.bytes_per_expert) for each in (home, plan))
    plan.predicted_gain_s = home_s - plan_s
    return plan if plan.predicted_gain_s > options.cost_model.margin_ratio * home_s else home


# By name; warm_up puts compiled twins in place.
PLANNERS: dict[str, StepPlanner] = {
    "quota": _quota,
    "least_loaded": partial(_least_loaded, _readable_least_loaded),
    "home": _home,
}


def _checked(counts_RE: Counts, placement: Placement, options: PlanOptions) -> Counts:
    """Counts as a writeable int64 array in C order, or ValueError naming what does not fit."""
    counts = np.asarray(counts_RE)
    shape = (placement.ep_size, placement.num_experts)
    if counts.shape != shape:
        raise ValueError(f"counts must have shape (ranks, experts) = {shape} as the placement has, got {counts.shape}")
    if counts.dtype.kind not in "iu":
        raise ValueError(f"counts must be integers, got dtype {counts.dtype}")
    if options.free_bytes is not None and len(options.free_bytes) != placement.ep_size:
        raise ValueError(
            f"free_bytes must have one entry per rank ({placement.ep_size}), got {len(options.free_bytes)}"
        )
    flags = counts.flags
    is_ready = counts.dtype == np.int64 and flags.c_contiguous and flags.writeable
    return counts if is_ready else counts.astype(np.int64, order="C")
