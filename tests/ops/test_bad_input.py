"""Common mistakes are clear where the operator looks: Prometheus' targets, its alerts, a log line, readyz."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from reporting import Engine
from running import Running, start

from llep.monitoring.rules import rules
from llep_server.config import ServerConfig
from tests.ops.manifests import pods, render
from tests.ops.prometheus import free_port, prometheus, wait_for
from tests.ops.test_alerts_arrive import in_seconds
from tests.ops.test_k8s import K8S, OVERLAYS, SECRETS

KEY = "a-key-of-prometheus-0123456789"


def scraped(running: Running, name: str) -> str:
    """What the page says of this metric."""
    running.app.state.exposition.keep_s = 0.0
    lines = running.http.get("/metrics").text.splitlines()
    return next((line.rpartition(" ")[2] for line in lines if line.startswith(name)), "absent")


def test_a_missing_key_and_a_wrong_port(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "keys").write_text(f"prometheus read {KEY}\n")
    for running in start(ServerConfig(keys_file=tmp_path / "keys"), tmp_path / "state"):
        right = running.url.removeprefix("http://")
        nobody = f"127.0.0.1:{free_port()}"
        with caplog.at_level(logging.INFO), prometheus(tmp_path, {"llep": right}, in_seconds(rules())) as watcher:
            wait_for(lambda: "401" in watcher.problem("llep"), 20)
            wait_for(lambda: "LlepTargetDown" in watcher.firing(), 30)
        assert any("GET /metrics 401" in line and "author=anonymous@" in line for line in caplog.messages)
        answer = running.http.get("/metrics")
        assert answer.status_code == 401 and "a key is needed" in answer.json()["error"]["message"]
        (tmp_path / "wrong").mkdir()
        with prometheus(tmp_path / "wrong", {"llep": nobody}, in_seconds(rules())) as watcher:
            wait_for(lambda: "connection refused" in watcher.problem("llep"), 20)
            wait_for(lambda: "LlepTargetDown" in watcher.firing(), 30)
        assert running.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_an_unreachable_scheduler(tmp_path: Path) -> None:
    for running in start(ServerConfig(), tmp_path / "state"):
        running.report(Engine())
        assert scraped(running, "llep_scheduler_up") == "1"
        running.caller.is_up = False
        answer = running.http.get("/readyz")
        assert answer.status_code == 503
        assert "no scheduler at 'auto': start one with 'llep serve'" in answer.text
        assert scraped(running, "llep_scheduler_up") == "0"


def test_a_metrics_level_that_is_too_high(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for running in start(ServerConfig(), tmp_path / "state"):
        engine = Engine(name="a", ep_size=8, layer_numbers=tuple(range(40)), num_experts=64)
        engine.run()
        running.report(engine)
        running.caller.wait_s = 0.0
        patch = {"metrics_level": "layer_rank", "metrics_max_series": 400}
        assert running.http.patch("/v1/settings", json=patch).status_code == 200
        running.report(engine)  # takes the directive
        running.report(engine)
        assert scraped(running, "llep_metrics_levels_dropped") == "2"
    (line,) = (line for line in caplog.messages if "levels of detail left out" in line)
    assert line.startswith("engine a: 2 levels") and "raise it or lower metrics_level" in line
    assert "LlepDetailDropped" in {rule.get("alert") for group in rules()["groups"] for rule in group["rules"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_missing_secret_keeps_pods_from_starting_in_silence(overlay: str) -> None:
    """None is optional: the kubelet names the one that is missing, in the pod's events (docs/kubernetes.md)."""
    wanted = set()
    for pod in pods(render(K8S / "overlays" / overlay)):
        sources = [
            volume["secret"] | {"name": volume["secret"]["secretName"]}
            for volume in pod.spec["volumes"]
            if "secret" in volume
        ]
        sources += [
            v["valueFrom"]["secretKeyRef"] for v in pod.environment.values() if "secretKeyRef" in v.get("valueFrom", {})
        ]
        assert not any(source.get("optional") for source in sources)
        wanted |= {source["name"] for source in sources}
    assert "llep-keys" in wanted <= set(SECRETS)
    help_text = (K8S.parent / "docs" / "kubernetes.md").read_text().partition("## When something is missing")[2]
    assert all(name in help_text for name in SECRETS)
