"""Faults made on purpose reach people: a real control plane, Prometheus, its rules and Alertmanager.

The rules are those that are shipped, with minutes made seconds.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from reporting import Engine
from running import Running, start

from llep.monitoring.rules import rules
from llep_server.config import ServerConfig
from tests.ops.prometheus import free_port, prometheus, running, wait_for
from tests.ops.tools import tool

MODEL = "org/tiny-moe"
TEMPLATES = "/usr/share/prometheus/alertmanager"


def in_seconds(content: Any) -> Any:
    """Durations such as 5m become 5s."""
    return json.loads(re.sub(r"\b(\d+)m\b", r"\1s", json.dumps(content)))


class Inbox:
    """Whom Alertmanager tells."""

    def __init__(self) -> None:
        self.alerts: dict[str, dict[str, Any]] = {}
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                inbox.alerts |= {a["labels"]["alertname"]: a for a in body["alerts"] if a["status"] == "firing"}
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def alertmanager(folder: Path, inbox: Inbox) -> Iterator[str]:
    """host:port of an Alertmanager that tells the inbox at once."""
    route = {"receiver": "inbox", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s"}
    receivers = [{"name": "inbox", "webhook_configs": [{"url": inbox.url}]}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump({"route": route, "receivers": receivers}))
    address = f"127.0.0.1:{free_port()}"
    command = [*at_home(tool("prometheus-alertmanager", "prometheus-alertmanager"), folder)]
    command += [f"--web.listen-address={address}"]
    command += [f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'alerts'}"]
    command += ["--cluster.listen-address="]
    with running(command, f"http://{address}/-/ready", folder / "alertmanager.log"):
        yield address


def at_home(program: str, folder: Path) -> list[str]:
    """How to start it. Debian's build looks for its templates where the package would have put them: where it was only
    unpacked, a copy looks for them relative to where it runs, by a path of the same length.
    """
    if Path(TEMPLATES).is_dir():
        return [program]
    copy = folder / "alertmanager"
    copy.write_bytes(Path(program).read_bytes().replace(TEMPLATES.encode(), f"{TEMPLATES[1:]}/".encode()))
    copy.chmod(0o755)
    return ["env", f"--chdir={Path(program).parents[2]}", str(copy)]


class VllmPage:
    """What vLLM's API server shows: tokens flow as long as it is not stuck."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        labels = ["model_name", "engine"]
        self.running = Gauge("vllm:num_requests_running", "-", labels, registry=registry)
        self.tokens = [
            Counter(f"vllm:{kind}_tokens", "-", labels, registry=registry) for kind in ("prompt", "generation")
        ]
        self.port = free_port()
        self.server, self.thread = start_http_server(self.port, "127.0.0.1", registry)
        self.is_stuck = False

    def serve(self) -> None:
        self.running.labels(MODEL, "0").set(1)
        for counter in self.tokens:
            counter.labels(MODEL, "0").inc(0 if self.is_stuck else 10)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Play:
    """Engines that serve and report ten times a second, in a thread, until the block ends."""

    def __init__(self, server: Running, page: VllmPage, engines: list[Engine]) -> None:
        self.server, self.page, self.engines = server, page, engines
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(0.1):
            self.page.serve()
            for engine in list(self.engines):
                engine.run(tokens=512)
                self.server.report(engine)


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


@pytest.fixture
def page() -> Iterator[VllmPage]:
    page = VllmPage()
    yield page
    page.close()


def test_faults_reach_people(tmp_path: Path, inbox: Inbox, page: VllmPage) -> None:
    shipped = in_seconds(rules())
    with (
        contextmanager(start)(ServerConfig(), tmp_path / "state") as control_plane,
        alertmanager(tmp_path, inbox) as told,
    ):
        targets = {"llep": control_plane.url.removeprefix("http://"), "vllm": f"127.0.0.1:{page.port}"}
        a, b = Engine(name="a"), Engine(name="b", seed=3)
        playing = [a, b]
        for engine in playing:
            engine.run()  # loads the planner, which takes a while
            control_plane.report(engine)
        with prometheus(tmp_path, targets, shipped, told) as watcher, Play(control_plane, page, playing):

            def arrives(alert: str, timeout_s: float = 90) -> dict[str, Any]:
                found: dict[str, Any] = wait_for(
                    lambda: inbox.alerts.get(alert), timeout_s, lambda: f"{alert}, but {set(inbox.alerts)}"
                )
                return found

            # Prometheus looks for its targets when it is five seconds old, which are minutes here.
            wait_for(lambda: watcher.query("engine:llep_imbalance_ratio:mean5m"), 30)
            time.sleep(4)
            # The times that an engine plays are made up: a third of them is overhead.
            wait_for(
                lambda: watcher.firing() <= {"LlepOverheadHigh"}, 60, lambda: f"all is well, but {watcher.firing()}"
            )
            threshold = control_plane.http.patch("/v1/settings?engines=a", json={"imbalance_threshold": 100})
            assert threshold.status_code == 200, threshold.text
            page.is_stuck = True
            stalled = arrives("LlepStalled")
            assert stalled["labels"]["severity"] == "critical" and stalled["labels"]["model_name"] == MODEL
            assert MODEL in stalled["annotations"]["summary"]
            assert stalled["annotations"]["runbook_url"] == "docs/runbook.md#llepstalled"
            arrives("LlepRevisionsDiffer")
            assert arrives("LlepImbalanceHigh")["labels"]["engine"] == "a"
            playing.remove(b)
            assert arrives("LlepEngineSilent")["labels"]["engine"] == "b"
            control_plane.caller.is_up = False
            arrives("LlepSchedulerDown")
