"""The dashboards: as made from their source, whole, and with data in every panel from a real Prometheus."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reporting import Engine
from running import Running, start

from llep.cli.export import dashboard_text, rules_text
from llep.monitoring.dashboards import dashboards
from llep.monitoring.queries import filled
from llep.monitoring.rules import ALERTS, RECORDINGS, rules
from llep.monitoring.vllm import vllm
from llep_server.config import ServerConfig
from llep_server.families import FAMILIES, SCHEDULER_FAMILIES
from tests.ops.prometheus import Prometheus, prometheus, wait_for
from tests.ops.queries import METRIC, panel_queries
from tests.ops.test_rules import case, promtool_test

ROOT = Path(__file__).parents[2]
DASHBOARDS = dashboards()
OVERVIEW = DASHBOARDS["llep-overview.json"]
# What the plan of a played engine never needs, and what only vLLM tells (tests/e2e asks for those).
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


def exported() -> set[str]:
    """Every name of a sample that the control plane can show."""
    names = {f.name + suffix for f in FAMILIES for suffix in SUFFIXES.get(f.type_name, ("",))}
    return names | set(SCHEDULER_FAMILIES)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_checked_in_file_is_as_made(name: str) -> None:
    # Provisioned is what compose's Prometheus has data for.
    folder = "through-ray" if name.endswith("-ray.json") else "dashboards"
    path = ROOT / "deploy" / "grafana" / folder / name
    assert path.read_text() == dashboard_text(DASHBOARDS[name]), f"write it anew, as {path}: llep export dashboards DIR"


def test_checked_in_rules_are_as_made() -> None:
    path = ROOT / "deploy" / "prometheus" / "rules" / "llep.yaml"
    assert path.read_text() == rules_text(rules()), "write it anew: llep export rules deploy/prometheus/rules"


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_panels_are_whole(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown = [panel for panel in panels if panel["type"] != "row"]
    assert len({panel["title"] for panel in shown}) == len(shown) > 25
    for panel in shown:
        assert len(panel["description"]) > 40, panel["title"]
        assert panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or below, (one, other)
        assert one["x"] + one["w"] <= 24


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_every_variable_is_used_and_defined(dashboard: dict[str, Any]) -> None:
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)(\w+)", json.dumps(dashboard["panels"])))
    assert used == defined


def test_no_query_asks_for_what_nobody_exports() -> None:
    asked = {name for query in panel_queries(OVERVIEW) for name in query.metrics}
    asked |= set(METRIC.findall(json.dumps([OVERVIEW["annotations"], OVERVIEW["templating"]])))
    asked |= {name for rule in (*RECORDINGS, *ALERTS) for name in METRIC.findall(rule.expr)}
    known = exported() | {recording.name for recording in RECORDINGS}
    assert {name for name in asked if not name.startswith("vllm:")} <= known


def test_vllms_metrics_are_found_under_each_of_their_names(tmp_path: Path) -> None:
    series = {
        f'{prefix}prompt_tokens_total{{engine="0",i="{prefix}"}}': "0+60x9"
        for prefix in ("vllm:", "vllm_", "ray_vllm_")
    }
    selector = vllm("prompt_tokens_total", 'engine="0"')
    test = {
        "expr": f"sum(rate({selector}[5m]))",
        "eval_time": "9m",
        "exp_samples": [{"labels": "{}", "value": 3}],
    }
    done = promtool_test(tmp_path, [case("names", series, []) | {"promql_expr_test": [test]}])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has watched a control plane with two engines for a while."""
    folder = tmp_path_factory.mktemp("prometheus")
    for running in start(ServerConfig(), folder / "state"):
        with prometheus(folder, {"llep": running.url.removeprefix("http://")}, rules()) as server:
            play(running, seconds=8)
            yield server


def play(running: Running, seconds: float) -> None:
    """Two engines that serve and report; one of them has errors."""
    level = {"metrics_level": "layer_rank"}
    engines = [Engine(name="a", ep_size=4, num_experts=32, start=level), Engine(name="b", start=level, seed=3)]
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        for engine in engines:
            engine.run(tokens=512)
            engine.run(tokens=8, phase="decode")
            assert running.report(engine) == []
        time.sleep(0.2)


def test_every_panel_has_data(seen: Prometheus) -> None:
    queries = [query for query in panel_queries(OVERVIEW) if not any(m.startswith("vllm:") for m in query.metrics)]
    assert len(queries) > 30
    for query in queries:
        wait_for(lambda query=query: seen.has_data(query.expr), 10, lambda query=query: f"{query}")


def test_every_variable_has_choices(seen: Prometheus) -> None:
    choices = {
        variable["name"]: seen.label_values(filled(variable["query"]["query"], "10s"))
        for variable in OVERVIEW["templating"]["list"]
        if variable["type"] == "query"
    }
    assert choices == {
        "model_name": ["org/tiny-moe"],
        "engine": ["a", "b"],
        "ep_rank": ["0", "1", "2", "3"],
        "layer": ["1", "2", "5"],
    }


def test_every_annotation_can_be_asked_for(seen: Prometheus) -> None:
    for annotation in OVERVIEW["annotations"]["list"]:
        seen.query(filled(annotation["expr"], "10s"))


def test_verdict_is_right(seen: Prometheus) -> None:
    """The numbers of the verdict, against the counters themselves."""
    by_title = {query.panel: query.expr for query in panel_queries(OVERVIEW)}
    assert 0.9 < seen.value(by_title["Prefill balancedness"]) <= 1
    assert 0.2 < seen.value(by_title["Prefill peak removed"]) < 0.8
    routed, computed = (seen.value(f"sum(llep_rank_{name}_tokens_total)") for name in ("routed", "computed"))
    assert routed == computed > 0
    assert seen.firing() == set()
