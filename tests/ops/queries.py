"""A dashboard's queries as Prometheus gets them: with Grafana's variables put in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VARIABLES = {"$__rate_interval": "10s", "$model_name": ".*", "$engine": ".*", "$ep_rank": ".*", "$layer": ".*"}
METRIC = re.compile(r"\b(?:(?<!ray_)vllm:\w+|llep_\w+|engine:llep_\w+:\w+)")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    panel: str
    expr: str

    @property
    def metrics(self) -> set[str]:
        return set(METRIC.findall(self.expr))


def panel_queries(dashboard: dict[str, Any]) -> Iterator[PanelQuery]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield PanelQuery(panel["title"], filled(target["expr"]))


def filled(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr
