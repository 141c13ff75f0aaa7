"""A dashboard's queries as Prometheus gets them: with Grafana's variables put in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llep.monitoring.queries import filled

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
            expr = filled(target["expr"], "10s")
            assert "$" not in expr, expr
            yield PanelQuery(panel["title"], expr)
