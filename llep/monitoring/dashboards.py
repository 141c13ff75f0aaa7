"""The dashboards as files: the overview, and a variant for engines whose vLLM metrics come through Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from llep.monitoring.grafana import Dashboard, as_json
from llep.monitoring.overview import OVERVIEW

# Ray replaces the colon and puts its own name before: vllm:prompt_tokens_total is ray_vllm_prompt_tokens_total there.
# llep's own metrics come from the control plane either way.
THROUGH_RAY = replace(
    OVERVIEW, uid="llep-overview-ray", title="llep overview, vLLM through Ray", description=OVERVIEW.description
)


def dashboards() -> dict[str, dict[str, Any]]:
    """Grafana's JSON by file name."""
    through_ray = json.loads(json.dumps(as_json(THROUGH_RAY)).replace("vllm:", "ray_vllm_"))
    return {_file(OVERVIEW): as_json(OVERVIEW), _file(THROUGH_RAY): through_ray}


def _file(dashboard: Dashboard) -> str:
    return f"{dashboard.uid}.json"
