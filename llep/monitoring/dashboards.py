"""The dashboards as files."""

from __future__ import annotations

from typing import Any

from llep.monitoring.grafana import as_json
from llep.monitoring.overview import OVERVIEW


def dashboards() -> dict[str, dict[str, Any]]:
    """Grafana's JSON by file name."""
    return {f"{dashboard.uid}.json": as_json(dashboard) for dashboard in (OVERVIEW,)}
