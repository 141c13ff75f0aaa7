"""Metrics through Ray: what its agents show, asked for by the dashboard and the rules made for that."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from llep.cli.with_ray import METRICS_PORT
from llep.monitoring.dashboards import NOT_THROUGH_RAY, dashboards
from llep.monitoring.rules import rules
from llep.monitoring.through_ray import through_ray
from llep_server.through_ray import flat
from tests.ops.prometheus import prometheus, wait_for
from tests.ops.queries import panel_queries
from tests.ops.test_with_ray import BIN, free_range, keep_reporting, started, url_of


def test_names() -> None:
    assert through_ray('rate(llep_steps_total{a="b"}[5m])') == 'rate(ray_llep_steps_total{a="b"}[5m])'
    assert through_ray("engine:llep_overhead:ratio5m > 0.25") == "engine:llep_overhead:ratio5m > 0.25"
    assert through_ray(through_ray("llep_info")) == "ray_llep_info"


def test_it_is_the_same_dashboard() -> None:
    ours, theirs = (dashboards()[f"llep-overview{end}.json"] for end in ("", "-ray"))
    asked = [through_ray(query.expr) for query in panel_queries(ours) if query.panel not in NOT_THROUGH_RAY]
    assert [query.expr for query in panel_queries(theirs)] == asked
    assert ours["uid"] != theirs["uid"] and ours["title"] != theirs["title"]


def test_histograms_become_three() -> None:
    histogram = HistogramMetricFamily("llep_x", "x", labels=["engine"])
    histogram.add_metric(["e"], [("1.0", 2), ("+Inf", 3)], 4.5)
    counter = CounterMetricFamily("llep_y", "y", labels=["engine"])
    counter.add_metric(["e"], 7)
    found = {name: (tuple(labels), samples) for name, _, labels, samples in flat([histogram, counter])}
    assert found["llep_x_bucket"] == (("engine", "le"), [(("e", "1.0"), 2.0), (("e", "+Inf"), 3.0)])
    assert found["llep_x_count"][1] == [(("e",), 3.0)] and found["llep_x_sum"][1] == [(("e",), 4.5)]
    assert found["llep_y_total"] == (("engine",), [(("e",), 7.0)])


@pytest.mark.ray
def test_every_panel_has_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_range()
    control_plane = (str(BIN / "llep"), "control-plane", "--port", "0")
    with started("head", tmp_path, port, *control_plane, LLEP_SERVER_RAY_METRICS="1"):
        url = url_of(tmp_path / "head.log")
        wait_for(lambda: httpx.get(f"{url}/v1/settings", timeout=20).status_code == 200, 90)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        shipped = rules(is_through_ray=True)
        with prometheus(tmp_path, {"ray": f"127.0.0.1:{port + METRICS_PORT}"}, shipped) as server:
            asyncio.run(keep_reporting(f"127.0.0.1:{port}", tmp_path, seconds=30))
            queries = list(panel_queries(dashboards()["llep-overview-ray.json"]))
            for query in queries:
                if not any(name.startswith("vllm:") for name in query.metrics):
                    expr = query.expr.replace("[10s]", "[1m]")  # Ray's agents are told every few seconds
                    wait_for(lambda expr=expr: server.has_data(expr), 20, lambda query=query: f"{query}")
            page = httpx.get(f"{url}/metrics", timeout=20).text
            routed = sum(map(float, re.findall(r"^llep_rank_routed_tokens_total{.*} (\S+)$", page, re.MULTILINE)))
            wait_for(lambda: server.value("sum(ray_llep_rank_routed_tokens_total)") == routed > 0, 30)
            assert server.query("engine:llep_imbalance_ratio:mean5m")
