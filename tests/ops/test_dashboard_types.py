"""The dashboards against Grafana's own types: TypeScript compiles them as literals of @grafana/schema."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llep.monitoring.dashboards import dashboards
from tests.ops.tools import TOOLS

PACKAGES = TOOLS / "grafana" / "node_modules"  # where `make tools` puts them
RAW = "@grafana/schema/dist/esm/raw"
# Enumerations stand as their values in JSON. Grafana fills in what a file leaves out.
PRELUDE = f"""
import type {{ Dashboard, Panel, VariableModel, AnnotationQuery }} from '{RAW}/dashboard/x/Dashboard_types.gen';
import type * as stat from '{RAW}/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as timeseries from '{RAW}/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';
import type * as heatmap from '{RAW}/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as bargauge from '{RAW}/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as table from '{RAW}/composable/table/panelcfg/x/TablePanelCfg_types.gen';
type Plain<T> = T extends string ? `${{T}}` : T extends number ? number : T extends boolean ? T
  : T extends (infer U)[] ? Plain<U>[] : T extends object ? {{ [K in keyof T]: Plain<T[K]> }} : T;
"""


def literals(dashboard: dict[str, Any], name: str) -> Iterator[str]:
    """TypeScript in which each part of the dashboard is declared to be what Grafana takes it for."""
    frame = dashboard | {"panels": [], "templating": {}, "annotations": {}}
    yield f"const {name}: Plain<Omit<Dashboard, 'id'>> = {json.dumps(frame)};"
    for index, variable in enumerate(dashboard["templating"]["list"]):
        yield f"const {name}_v{index}: Plain<VariableModel> = {json.dumps(variable)};"
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield from panel_literals(panel, f"{name}_p{panel['id']}")


def panel_literals(panel: dict[str, Any], name: str) -> Iterator[str]:
    kind = panel["type"]
    defaults = panel["fieldConfig"]["defaults"]
    bare = panel | {
        "options": {},
        "targets": [],
        "fieldConfig": {"defaults": defaults | {"custom": {}}, "overrides": []},
    }
    yield f"const {name}: Plain<Panel> = {json.dumps(bare)};"
    yield f"const {name}_o: Plain<Partial<{kind}.Options>> = {json.dumps(panel['options'])};"
    if kind == "timeseries":
        yield f"const {name}_f: Plain<timeseries.FieldConfig> = {json.dumps(defaults['custom'])};"


def compiled(folder: Path, lines: list[str]) -> str:
    """What the compiler has to say."""
    if not (PACKAGES / ".bin" / "tsc").exists() or shutil.which("node") is None:
        pytest.skip("@grafana/schema and typescript are not there: `make tools`, with npm")
    (folder / "dashboards.ts").write_text("\n".join([PRELUDE, *lines]))
    (folder / "node_modules").symlink_to(PACKAGES)
    command = [
        PACKAGES / ".bin" / "tsc",
        "--noEmit",
        "--strict",
        "--skipLibCheck",
        "--module",
        "nodenext",
        "dashboards.ts",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def test_grafana_takes_them(tmp_path: Path) -> None:
    lines = [line for index, d in enumerate(dashboards().values()) for line in literals(d, f"d{index}")]
    assert compiled(tmp_path, lines) == ""


def test_the_compiler_sees_mistakes(tmp_path: Path) -> None:
    dashboard = dashboards()["llep-overview.json"]
    panel = next(panel for panel in dashboard["panels"] if panel["type"] == "stat")
    panel["options"]["colorMode"] = "backgroundd"
    panel["gridPos"]["z"] = 1
    said = compiled(tmp_path, list(literals(dashboard, "d")))
    assert '"backgroundd"' in said and "'\"z\"'" in said
