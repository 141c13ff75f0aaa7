"""Plain EP as a planner: every token is computed on its expert's home rank."""

from __future__ import annotations

from llep.loads import Loads
from llep.placement import Placement
from llep.plan import Decision, Plan, home_segments


def plan_home(tokens_per_expert: Loads, placement: Placement, decision: Decision = Decision.OFF) -> Plan:
    """The plan that moves nothing; `decision` says why."""
    return Plan(decision, placement, home_segments(tokens_per_expert, placement))
