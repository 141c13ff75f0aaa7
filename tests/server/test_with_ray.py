"""The control plane's process with a real Ray: finds the scheduler, outlives Ray, finds it again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from reporting import Engine
from test_process import READY

from llep.messages import decode_directive, encode
from llep.scheduler.client import SchedulerClient

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent


class RayHead:
    """A Ray of its own on a fixed port, started and ended as often as a test likes."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._environ = environ | {"RAY_AUTH_MODE": "disabled"}
        self._folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: it holds unix sockets
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [BIN / "ray", "start", "--head", "--block", f"--port={self.port}", "--num-cpus=1"]
        command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={self._folder}"]
        command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={100 << 20}"]
        with open(Path(self._folder) / "head.log", "ab") as log:
            self._process = subprocess.Popen(command, env=self._environ, stdout=log, stderr=log, start_new_session=True)
        wait_until(lambda: _listens(self.port), 60)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=20)
            self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.2)


@pytest.fixture
def ray_head(environ: dict[str, str]) -> Iterator[RayHead]:
    head = RayHead(environ)
    try:
        head.start()
        yield head
    finally:
        head.close()


@pytest.fixture
def http(
    environ: dict[str, str], ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command = [BIN / "llep", "control-plane", "--port", "0", "--ray-address", ray_head.address]
    command += ["--state-dir", str(tmp_path / "state")]
    environ = environ | {"RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = READY.match(process.stdout.readline())
            assert found
            with httpx.Client(base_url=found[1], trust_env=False, timeout=20) as http:
                yield http
            assert process.poll() is None, "it ended with Ray"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0


async def report(client: SchedulerClient, engine: Engine) -> None:
    answer = await client.call("report", [encode(report) for report in engine.reports()], engine.revision)
    assert answer["refused"] == []
    if answer["directive"] is not None:
        engine.take(decode_directive(answer["directive"]))


def hand_in(ray_head: RayHead, state_dir: Path, engine: Engine, *, times: int = 1) -> None:
    """As the agent of the engine does, over its own link to the scheduler."""

    async def run() -> None:
        async with SchedulerClient(ray_head.address, "llep", state_dir) as client:
            assert await client.wait_connected(60)
            for _ in range(times):
                await report(client, engine)
                engine.run(tokens=256)

    asyncio.run(run())


def ask_everything(http: httpx.Client) -> None:
    """Each question once, and changes that change nothing: all of the surface is there in the real scheduler."""
    for path in (
        *("/v1/engines", "/v1/engines/tiny", "/v1/settings?engine=tiny", "/v1/settings/schema"),
        *("/v1/settings/revisions", "/v1/loads?phase=prefill", "/v1/loads/history", "/v1/loads/matrix?by=expert"),
        *("/v1/loads/matrix?format=parquet", "/v1/loads/hot", "/v1/plans", "/v1/placement", "/v1/advice"),
        *("/v1/decisions", "/v1/recordings", "/v1/operations", "/v1/events?engine=tiny&kind=engine_up"),
    ):
        answer = http.get(path)
        assert answer.status_code == 200, (path, answer.text)
    with http.stream("GET", "/v1/loads/stream") as stream:
        assert next(line for line in stream.iter_lines() if line.startswith("event")) == "event: loads"
    for path, code in (("/v1/plans/4611686018427387904", "unknown_plan"), ("/v1/recordings/x", "unknown_recording")):
        assert http.get(path).json()["error"]["code"] == code
    for path, body, codes in (
        ("/v1/placement/suggest", None, (None, "placement_refused")),
        ("/v1/placement/apply", {"dry_run": True}, ("placement_refused",)),  # replicas is off
        ("/v1/placement/rollback", {}, ("placement_refused",)),
        ("/v1/settings/rollback", {"revision": 99}, ("unknown_revision",)),
        ("/v1/tuning", {"recording": "x"}, ("unknown_recording",)),
        ("/v1/plans/simulate", {"tokens": [[9000, 1], [9000, 1]], "min_chunk_tokens": 1}, (None,)),
    ):
        answer = http.post(path, json=body, timeout=90)
        assert answer.json().get("error", {}).get("code") in codes, (path, answer.text)


def test_from_nothing_to_ready_through_a_change_and_the_end_of_ray(
    http: httpx.Client, ray_head: RayHead, tmp_path: Path
) -> None:
    wait_until(lambda: http.get("/v1/settings").status_code == 200, 60)  # the scheduler was started by whom it misses
    assert "engines: 0 of 0 engines" in http.get("/readyz").json()["error"]["message"]

    engine = Engine()
    hand_in(ray_head, tmp_path / "state", engine, times=3)
    assert http.get("/readyz").json()["ready"] is True
    (loads,) = http.get("/v1/loads").json()["data"]
    assert loads["tokens"] == 2 * 256 and loads["lends"] > 0
    assert "llep_scheduler_up 1\n" in http.get("/metrics").text

    refused = http.patch("/v1/settings", json={"imbalance_threshold": 0})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "imbalance_threshold"
    change = http.patch("/v1/settings", json={"imbalance_threshold": 2.5}, headers={"If-Match": '"0"'}).json()
    assert (change["revision"], change["applied"][0]["state"]) == (1, "sent")
    conflict = http.patch("/v1/settings", json={"watchdog_s": 30}, headers={"If-Match": '"0"'})
    assert conflict.status_code == 412 and conflict.json()["error"]["code"] == "revision_conflict"
    assert http.get("/v1/engines/nobody").status_code == 404
    ask_everything(http)

    ray_head.kill()
    wait_until(lambda: http.get("/v1/engines").status_code == 503, 30)
    started_s = time.monotonic()
    body = http.get("/v1/engines").json()
    assert time.monotonic() - started_s < 10
    assert body["error"]["code"] == "scheduler_unreachable" and ray_head.address in body["error"]["message"]
    assert http.get("/livez").status_code == 200
    wait_until(lambda: "llep_scheduler_up 0\n" in http.get("/metrics").text, 10)

    ray_head.start()
    wait_until(lambda: http.get("/v1/settings").status_code == 200, 60)
    settings = {s["key"]: s["value"] for s in http.get("/v1/settings").json()["settings"]}
    assert settings["imbalance_threshold"] == 2.5  # acknowledged before, so still there
    hand_in(ray_head, tmp_path / "state", engine, times=2)
    assert engine.settings.imbalance_threshold == 2.5
    assert http.get("/readyz").json()["ready"] is True
    kinds = [event["kind"] for event in http.get("/v1/events").json()["data"]]
    assert kinds.count("scheduler_started") == 2 and "settings" in kinds
