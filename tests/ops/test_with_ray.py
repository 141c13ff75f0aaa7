"""What the containers run, without containers: a head with the control plane, and an engine's node that joins it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from reporting import Engine

from llep.messages import encode
from llep.scheduler.client import SCHEDULER_RESOURCE, SchedulerClient
from tests.ops.prometheus import free_port, wait_for

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
URL = re.compile(r"llep control plane at (\S+),")


def free_range(size: int = 100) -> int:
    """The first of so many ports that nobody uses: below those that the kernel hands out, apart from other workers'."""
    mine = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
    return 12000 + mine * 9000 + (free_port() * size) % 9000


@contextmanager
def started(role: str, folder: Path, port: int, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`llep with-ray`, ended with SIGTERM as containers are."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "RAY_"))}
    environ = (
        kept | {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "LLEP_STATE_DIR": str(folder / "state")} | environment
    )
    words = [str(BIN / "llep"), "with-ray", "--node-ip", "127.0.0.1", "--port", str(port), role, *command]
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(words, env=environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def url_of(log: Path) -> str:
    found = wait_for(lambda: URL.search(log.read_text()), 60, log.read_text)
    return str(found[1])


def keeper_of_scheduler(address: str) -> dict[str, float]:
    """The resources of the Ray node that the scheduler runs on; and that there are two nodes."""
    program = f"""
import json, ray
from ray._private.state import actors
ray.init(address="{address}", namespace="llep", log_to_driver=False, logging_level="ERROR")
nodes = {{node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}}
assert len(nodes) == 2, nodes
(scheduler,) = [actor for actor in actors().values() if actor["Name"] == "llep-scheduler"]
print(json.dumps(nodes[scheduler["Address"]["NodeID"]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    resources: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return resources


async def hand_in(address: str, folder: Path) -> dict[str, Any]:
    """A report, as the agent beside an engine brings it."""
    async with SchedulerClient(address, "llep", folder / "elsewhere") as client:
        assert await client.wait_connected(60)
        engine = Engine()
        engine.run()
        await client.call("report", [encode(report) for report in engine.reports()], 0)
        status: dict[str, Any] = await client.call("status")
        return status


async def keep_reporting(address: str, folder: Path, seconds: float) -> None:
    """An engine that serves and reports, as its agent would tell it."""
    async with SchedulerClient(address, "llep", folder / "elsewhere") as client:
        assert await client.wait_connected(60)
        engine = Engine(ep_size=4, num_experts=32, start={"metrics_level": "layer_rank"})
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            engine.run()
            engine.run(tokens=8, phase="decode")
            await client.call("report", [encode(report) for report in engine.reports()], 0, timeout_s=20.0)
            await asyncio.sleep(0.5)


def test_head_and_node_are_one_ray_and_end_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_range()
    address = f"127.0.0.1:{port}"
    control_plane = (str(BIN / "llep"), "control-plane", "--port", "0")
    started_s = time.monotonic()
    with started("head", tmp_path, port, *control_plane) as head:
        with started("node", tmp_path, port + 100, "sleep", "600", LLEP_RAY_ADDRESS=address) as node:
            url = url_of(tmp_path / "head.log")
            wait_for(lambda: httpx.get(f"{url}/v1/settings", timeout=20).status_code == 200, 90)
            assert (tmp_path / "token").stat().st_mode & 0o777 == 0o400
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
            status = asyncio.run(hand_in(address, tmp_path))
            assert Path(status["store_path"]) == tmp_path / "state", "the head's folder, whoever asks"
            assert httpx.get(f"{url}/readyz", timeout=20).status_code == 200
            wait_for(lambda: "Ray runtime started" in (tmp_path / "node.log").read_text(), 60)
            assert SCHEDULER_RESOURCE in keeper_of_scheduler(address)
            os.kill(status["pid"], signal.SIGKILL)
            again = asyncio.run(hand_in(address, tmp_path))
            assert again["pid"] != status["pid"] and again["store_path"] == status["store_path"]
            assert SCHEDULER_RESOURCE in keeper_of_scheduler(address)
        assert node.returncode == 128 + signal.SIGTERM
    assert head.returncode == 0, (tmp_path / "head.log").read_text()
    assert time.monotonic() - started_s < 300


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("head",), {}, "no command"),
        (("node", "true"), {}, "neither 'auto' nor host:port"),
        (("node", "true"), {"LLEP_RAY_ADDRESS": "auto"}, "names no Ray to join"),
        (("head", "true"), {"HOME": "/nowhere"}, "Ray wants a token and there is none"),
        (("head", "no-such-command"), {"RAY_AUTH_TOKEN": "x" * 64}, "no-such-command is no command that can be run"),
        (("head", "true"), {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "RAY_AUTH_TOKEN_PATH=/nowhere/token can't be"),
    ],
)
def test_mistakes_are_said(words: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "RAY_"))}
    command = [str(BIN / "llep"), "with-ray", *words]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_node_says_that_it_waits_for_its_token(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "RAY_"))}
    more = {"LLEP_RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    command = [str(BIN / "llep"), "with-ray", "--node-ip", "127.0.0.1", "node", "true"]
    done = subprocess.run(command, env=kept | more, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and f"Ray waits for its token in {tmp_path / 'token'}" in done.stdout
