"""A real Prometheus, with rules and targets, on a free port."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.ops.tools import tool


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def wait_for(what: Callable[[], Any], timeout_s: float, why: Callable[[], str] = str) -> Any:
    """The first true answer of what(); fails when the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {why()}"
        time.sleep(0.25)
    return found


@contextmanager
def running(command: list[str], ready_url: str, log: Path) -> Iterator[None]:
    """A process that answers at ready_url; ended with the block."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_for(lambda: process.poll() is not None or _answers(ready_url), 30, log.read_text)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Prometheus:
    """Answers queries. Use `with prometheus(...)`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector: [{"metric": labels, "value": [time, text]}]."""
        answer = self._get("query", query=expr)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, expr: str) -> float:
        """The one number of an instant vector of one."""
        (sample,) = self.query(expr)
        return float(sample["value"][1])

    def has_data(self, expr: str) -> bool:
        """Whether there is a number at all."""
        return any(sample["value"][1] != "NaN" for sample in self.query(expr))

    def label_values(self, query: str) -> list[str]:
        """What Grafana's label_values(selector, label) shows."""
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert found, query
        selector, label = found.groups()
        answer = self._get(f"label/{label}/values", **{"match[]": selector})
        values: list[str] = answer["data"]
        return values

    def firing(self) -> set[str]:
        """The alerts that fire."""
        alerts = self._get("alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def problem(self, job: str) -> str:
        """Why the job's target can't be scraped, as Prometheus' page of targets says it; '' if it can."""
        targets = self._get("targets")["data"]["activeTargets"]
        return next((str(target["lastError"]) for target in targets if target["labels"]["job"] == job), "")

    def own_metric(self, name: str) -> int:
        """One of the counters that Prometheus keeps of itself."""
        page = httpx.get(f"{self.url}/metrics", timeout=20, trust_env=False).text
        (line,) = re.findall(rf"^{name} (.+)$", page, re.MULTILINE)
        return int(float(line))

    def _get(self, path: str, **query: str) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=query, timeout=20, trust_env=False)
        assert response.status_code == 200, f"{query}: {response.text}"
        return response.json()


@contextmanager
def prometheus(
    folder: Path,
    targets: Mapping[str, str],
    rules: Mapping[str, Any] | None = None,
    alertmanager: str = "",
    scrape_s: float = 1.0,
) -> Iterator[Prometheus]:
    """targets: host:port by job; rules: a rules file's content; scraped and evaluated every scrape_s seconds."""
    every = f"{scrape_s:g}s"
    config: dict[str, Any] = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
        ],
    }
    if rules is not None:
        (folder / "rules.json").write_text(json.dumps(rules))  # JSON is YAML
        config["rule_files"] = ["rules.json"]
    if alertmanager:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={folder / 'data'}"]
    with running(command, f"http://{address}/-/ready", folder / "prometheus.log"):
        yield Prometheus(f"http://{address}")
