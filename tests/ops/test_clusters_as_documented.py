"""What README and docs say to type where Ray, control plane and `vllm serve` are started one by one, line by line in a
shell: with a small model of the same family, two ranks on CPUs, and all machines being this one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llep.tiny_models import write_tiny_model
from tests.documented import PAGES, blocks
from tests.e2e.processes import MARK, Family, kill_all
from tests.ops.prometheus import free_port
from tests.ops.test_two_machines import VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S, FOLLOW_S = 420.0, 60.0
KEY = secrets.token_hex(16)
SMALL_RAY = "--node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=80000000 --disable-usage-stats"
ON_CPUS = (
    "--dtype float32 --enforce-eager --max-model-len 2048 --max-num-batched-tokens 2048 --max-num-seqs 8 "
    "--host 127.0.0.1"
)
FAMILIES = {"openai/gpt-oss-120b": "gpt-oss", "deepseek-ai/DeepSeek-R1": "deepseek", "MODEL": "gpt-oss"}


def documented() -> list[Any]:
    """The blocks that start a Ray and then a vLLM, as lines."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n.*?^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = [line for line in blocks(block) if line]
            if any(line.startswith("ray start") for line in lines):
                assert any("vllm serve" in line for line in lines)
                found.append(pytest.param(lines, id=page.name))
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="docs-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """Everything that the lines of one block start, on ports and in folders of its own; ended with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ray_port, control_plane_port, api_port = free_port(), free_port(), free_port()
        self.control_plane, self.api = (f"http://127.0.0.1:{port}" for port in (control_plane_port, api_port))
        self._on_cpus = f" --port {api_port} --served-model-name model {ON_CPUS}"
        self._going_on: list[subprocess.Popen[bytes]] = []
        small_head = f"{SMALL_RAY} --include-dashboard=false --temp-dir={folder}/ray"
        self._flags = {
            "ray start --head": f"ray start --head {small_head} --port={self.ray_port}",
            "ray start --address": f"ray start {SMALL_RAY} --address",
            "llep control-plane": f"llep control-plane --port {control_plane_port}",
            " --port=6379": "",
            "6379": str(self.ray_port),
            "HEAD:": "127.0.0.1:",
            "FIRST:": "127.0.0.1:",
            "-parallel-size 8": "-parallel-size 2",
            " --moe-backend marlin": "",  # of a GPU's kernels
            " --moe-backend triton": "",
        }
        mark = secrets.token_hex(8)
        self._family = Family(mark)
        (folder / "bin").mkdir()
        (folder / "bin" / "vllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.ops.vllm_serve "$@"\n')
        (folder / "bin" / "vllm").chmod(0o755)
        (folder / "keys.txt").write_text(f"ops admin {KEY}\n")
        (folder / "keys.txt").chmod(0o600)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLEP_", "RAY_", "VLLM_"))}
        self._environment = kept | VLLM | {
            MARK: mark,
            "PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
            "RAY_TMPDIR": str(folder / "ray"),  # where `auto` looks for a Ray
            "LLEP_STATE_DIR": str(folder / "state"),
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        }  # fmt: skip

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *why: object) -> None:
        for _ in range(3):  # some start others while they are being ended
            kill_all(self._family.alive())
            time.sleep(0.1)
        for process in self._going_on:
            process.wait(10)

    def type(self, line: str) -> None:
        """As a person does: what does not come back goes on in the background."""
        for name, family in FAMILIES.items():
            if re.search(rf"\b{name}\b", line):
                model = self.folder / name.lower()
                write_tiny_model(family, model, hot=tuple(range(8)), hot_share=0.9, vocab=2048)
                line = line.replace(name, str(model))
        for given, here in self._flags.items():
            line = line.replace(given, here)
        if "vllm serve" in line:
            line += self._on_cpus
        with (self.folder / "out.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", "-c", line],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._family.alive()
        if "llep control-plane" in line or "vllm serve" in line:
            self._going_on.append(process)
        else:
            assert process.wait(120) == 0, f"{line}\n{self.said()}"

    def wait_for(self, what: Callable[[], Any], within_s: float) -> Any:
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                if found := what():
                    return found
            except (httpx.HTTPError, KeyError, ValueError):
                pass
            ended = [process.args for process in self._going_on if process.poll() is not None]
            assert not ended and time.monotonic() < deadline_s, f"ended: {ended}\n{self.said()}"
            time.sleep(0.5)

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.get(f"{self.control_plane}{path}", headers=headers, timeout=20).json()["data"]

    def said(self) -> str:
        return (self.folder / "out.log").read_text(errors="replace")[-6000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("lines", documented())
def test_what_is_typed_serves_is_seen_and_balanced(lines: list[str], folder: Path) -> None:
    with Cluster(folder) as cluster:
        for line in lines:
            cluster.type(line)
        cluster.wait_for(lambda: httpx.get(f"{cluster.api}/health", timeout=5).status_code == 200, START_S)
        body = {"model": "model", "prompt": list(range(5, 905)), "max_tokens": 4}
        answer = httpx.post(f"{cluster.api}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        live = cluster.wait_for(lambda: [one for one in cluster.get("/v1/engines") if one["state"] == "live"], FOLLOW_S)
        (name,) = {match[1] for line in lines if (match := re.search(r"LLEP_ENGINE=(\S+)", line))} or {None}
        assert len(live) == 1 and len(live[0]["ranks"]) == 2 and live[0]["id"] == (name or "model")
        loads = cluster.wait_for(lambda: lent(cluster.get("/v1/loads?window_s=300")), FOLLOW_S)
        assert loads["imbalance_ratio_before"] > loads["imbalance_ratio_after"]


def lent(loads: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((one for one in loads if one["lends"]), None)


def test_there_are_such_blocks() -> None:
    assert len(documented()) >= 3
