"""Plain EP as a planner: every token is computed on its expert's home rank."""

from __future__ import annotations

from collections.abc import Sequence

from llep.placement import Placement
from llep.plan import Decision, Plan, home_segments


def plan_home(tokens_per_expert: Sequence[int], placement: Placement, decision: Decision = Decision.OFF) -> Plan:
    """The plan that moves nothing; `decision` says why."""
    return Plan(decision, placement, home_segments(tokens_per_expert, placement.home_rank))
