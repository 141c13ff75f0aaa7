"""The dashboards as files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llep.monitoring.grafana import Dashboard, Panel, as_json
from llep.monitoring.overview import OVERVIEW
from llep.monitoring.through_ray import through_ray

NOT_THROUGH_RAY = ("Time of a scrape",)  # of Ray's nodes, which says nothing about llep


def dashboards() -> dict[str, dict[str, Any]]:
    """Grafana's JSON by file name."""
    return {f"{dashboard.uid}.json": as_json(dashboard) for dashboard in (OVERVIEW, for_ray(OVERVIEW))}


def for_ray(dashboard: Dashboard) -> Dashboard:
    """The same for metrics that come through Ray, under the names that they have there."""
    rows = [
        replace(row, panels=[_panel(panel) for panel in row.panels if panel.title not in NOT_THROUGH_RAY])
        for row in dashboard.rows
    ]
    return replace(
        dashboard,
        uid=f"{dashboard.uid}-ray",
        title=f"{dashboard.title}, through Ray",
        rows=rows,
        variables=[replace(each, query=through_ray(each.query)) for each in dashboard.variables],
        annotations=[replace(each, expr=through_ray(each.expr)) for each in dashboard.annotations],
    )


def _panel(panel: Panel) -> Panel:
    return replace(panel, queries=[replace(query, expr=through_ray(query.expr)) for query in panel.queries])
