"""An engine over two machines, as the overlay `deepseek` starts it: two host names, a Ray node and an agent on each."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from llep.tiny_models import write_tiny_model
from tests.ops.manifests import pods
from tests.ops.prometheus import free_port, wait_for
from tests.ops.test_with_ray import BIN, free_range, started, url_of

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

REPO = Path(__file__).parents[2]
OVERLAY = REPO / "k8s" / "overlays" / "deepseek" / "leaderworkerset.yaml"
IN_ITS_OWN_NAME = ("unshare", "--user", "--map-root-user", "--uts")
ON_A_CPU = (
    "--dtype=float32 --enforce-eager --max-model-len=2048 --max-num-batched-tokens=2048 --served-model-name=model"
    " --max-num-seqs=8"
)
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "LLEP_MIN_BATCH_TOKENS": "16",
    "LLEP_MIN_CHUNK_TOKENS": "8",
    "LLEP_REPORT_INTERVAL_S": "0.2",
}
START_S, FOLLOW_S = 600.0, 60.0


def can_rename() -> bool:
    """Whether a process here may have a host name of its own."""
    return shutil.which("unshare") is not None and not subprocess.call([*IN_ITS_OWN_NAME, "hostname", "other"])


def shell_line(role: str, model: Path, ray_port: int, api_port: int, rpc_port: int) -> str:
    """What the overlay's pod runs, for one rank on each of two machines instead of eight."""
    (line,) = next(
        pod.container["args"] for pod in pods([yaml.safe_load(OVERLAY.read_text())]) if pod.owner.endswith(role)
    )
    here = {
        "llep with-ray node vllm serve": f"{BIN}/llep with-ray --port {ray_port} node {sys.executable} "
        "-m tests.ops.vllm_serve serve",
        "deepseek-ai/DeepSeek-V3": f"{shlex.quote(str(model))} {ON_A_CPU}",
        "--moe-backend=triton ": "",  # a GPU's
        "--data-parallel-size=16": "--data-parallel-size=2",
        "--data-parallel-size-local=8": "--data-parallel-size-local=1",
        "--data-parallel-rpc-port=13345": f"--data-parallel-rpc-port={rpc_port}",
        "8 * LWS_WORKER_INDEX": "LWS_WORKER_INDEX",
    }
    only_leader = {"--host=0.0.0.0": "--host=127.0.0.1 --api-server-count=1", "--port=8000": f"--port={api_port}"}
    for old, new in (here | (only_leader if role == "leader" else {})).items():
        assert old in line or (role == "leader" and "WORKER" in old), old
        line = line.replace(old, new)
    return line


@contextmanager
def machine(name: str, line: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The line in a session under a host name of its own, ended as pods are."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LLEP_", "RAY_"))}
    command = [*IN_ITS_OWN_NAME, "sh", "-c", f"hostname {name}; {line}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPO, env=kept | VLLM | environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=40)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a path short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1000)
def test_an_engine_over_two_machines_is_seen_and_steered_whole(folder: Path) -> None:
    if not can_rename():
        pytest.skip("no host name of one's own for a process here (unshare)")
    model = write_tiny_model("deepseek", folder / "model", hot=(0, 1, 2, 3, 4, 5, 6, 7), hot_share=0.9, vocab=2048)
    ray_port, api_port = free_range(400), free_port()
    rpc_port = free_port()
    api, logs = f"http://127.0.0.1:{api_port}", [folder / f"{name}.log" for name in ("leader", "worker")]
    pod = {
        "LLEP_RAY_ADDRESS": f"127.0.0.1:{ray_port}",
        "POD_IP": "127.0.0.1",
        "LWS_LEADER_ADDRESS": "127.0.0.1",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    with ExitStack() as stack:
        stack.enter_context(started("head", folder, ray_port, str(BIN / "llep"), "control-plane", "--port", "0"))
        control_plane = url_of(folder / "head.log")
        wait_for(lambda: httpx.get(f"{control_plane}/v1/settings", timeout=20).status_code == 200, START_S)
        machines = []
        for index, (role, log) in enumerate(zip(("leader", "worker"), logs, strict=True)):
            line = shell_line(role, model.directory, ray_port + 100 * (index + 1), api_port, rpc_port)
            more = {
                "LWS_WORKER_INDEX": str(index),
                "VLLM_CPU_OMP_THREADS_BIND": str(index),
                "LLEP_ENGINE": f"pod-{index}",
            }
            machines.append(stack.enter_context(machine(f"node-{index}", line, log, **pod, **more)))

        def found(what: Callable[[], Any], within_s: float) -> Any:
            deadline_s = time.monotonic() + within_s
            while not (answer := quietly(what)):
                ended = [process.poll() for process in machines]
                said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
                assert ended == [None, None] and time.monotonic() < deadline_s, f"{ended}\n{said}"
                time.sleep(0.5)
            return answer

        found(lambda: httpx.get(f"{api}/health", timeout=5).status_code == 200, START_S)

        def engine() -> dict[str, Any]:
            (engine,) = httpx.get(f"{control_plane}/v1/engines", timeout=20).json()["data"]
            return dict(engine)

        def ask() -> int:
            body = {"model": "model", "prompt": list(range(5, 205)), "max_tokens": 4}
            return httpx.post(f"{api}/v1/completions", json=body, timeout=120).status_code

        live = found(lambda: (one := engine())["state"] == "live" and one, FOLLOW_S)
        assert live["id"] == "pod-0" and [rank["rank"] for rank in live["ranks"]] == [0, 1], "under rank 0's name"
        assert ask() == 200
        change = httpx.patch(f"{control_plane}/v1/settings", json={"imbalance_threshold": 2.5}, timeout=20).json()
        assert ask() == 200
        ranks = found(
            lambda: (
                (ranks := engine()["ranks"])
                and all(rank["live_revision"] == change["revision"] for rank in ranks)
                and ranks
            ),
            FOLLOW_S,
        )
        assert all(rank["memory_budget_bytes"] > 0 for rank in ranks)
        loads = found(lambda: (one := loads_of(control_plane))["lends"] and one, FOLLOW_S)
        assert loads["imbalance_ratio_before"] > loads["imbalance_ratio_after"]
        page = httpx.get(f"{control_plane}/metrics", timeout=20).text
        assert re.search(r'llep_lends_total\{.*link="network".*\} [1-9]', page), "between machines"


def loads_of(control_plane: str) -> dict[str, Any]:
    (loads,) = httpx.get(f"{control_plane}/v1/loads", params={"window_s": 300}, timeout=20).json()["data"]
    return dict(loads)


def quietly(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except (httpx.HTTPError, KeyError, ValueError):
        return None
