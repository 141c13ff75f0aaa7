"""A real vLLM server on CPU, as tests start it: `with serving(model, *flags, env=...) as engine`."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 420.0
VOCABULARY = 2048  # of the tiny models, of which prompts are made
LENGTHS = (1, 40, 700, 300)  # of prompts. One token looks like decode: the first step after a change may be captured
MAX_TOKENS = 12
ONE_RANK = ("--enforce-eager",)
TP_EP = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
DP_EP = ("--data-parallel-size", "2", "--enable-expert-parallel")
TP_DP_EP = ("--tensor-parallel-size", "2", *DP_EP)
SWITCHABLE = ("--worker-extension-cls", "tests.vllm.extension.Switch")


@dataclass(frozen=True)
class Reply:
    tokens: list[str]  # 'token_id:N'
    logprobs: list[float]


@dataclass(frozen=True)
class Engine:
    url: str
    log: Path
    _revisions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def switch(self, **settings: Any) -> None:
        """Change settings of an engine that was started with SWITCHABLE; live when it returns."""
        arguments = [str(next(self._revisions)), json.dumps(settings)]
        body = {"method": "llep_switch", "args": arguments}
        httpx.post(f"{self.url}/collective_rpc", json=body, timeout=60).raise_for_status()
        self.greedy([300], max_tokens=2)  # live from the step that all ranks hold it in, the first or the second

    def greedy(self, prompt: Sequence[int], max_tokens: int = 12) -> Reply:
        """The greedy continuation of token ids, with the log-probability of each token."""
        response = httpx.post(
            f"{self.url}/v1/completions",
            json={
                "model": "model",
                "prompt": list(prompt),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 1,
                "return_tokens_as_token_ids": True,
            },
            timeout=120,
        )
        assert response.status_code == 200, response.text
        logprobs: dict[str, Any] = response.json()["choices"][0]["logprobs"]
        return Reply(logprobs["tokens"], logprobs["token_logprobs"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    model: Path, *flags: str, log: Path, env: Mapping[str, str | None] | None = None, yields: bool = False
) -> Iterator[Engine]:
    """Serve `model` until the block ends, then end every process that was started. None in `env` unsets a variable.

    yields: to whatever else wants the cores, as under `llep serve`.
    """
    port = free_port()
    ranks = math.prod(int(size) for flag, size in pairwise(flags) if flag.endswith("-parallel-size"))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("LLEP_")},
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if ranks == 1 else "|".join(str(rank % 2) for rank in range(ranks)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        **({"VLLM_SERVER_DEV_MODE": "1"} if SWITCHABLE[0] in flags else {}),  # brings /collective_rpc
        **({"TORCHDYNAMO_DISABLE": "1"} if "--enforce-eager" in flags else {}),  # vLLM compiles small functions even so
        **(env or {}),
    }
    environment = {key: value for key, value in environment.items() if value is not None}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--no-enable-prefix-caching", *flags),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    if yields:
        with suppress(OSError):
            Path(f"/proc/{process.pid}/autogroup").write_text("10")
    try:
        yield Engine(_when_ready(f"http://127.0.0.1:{port}", process, log), log)
    finally:
        _end(process)


def _when_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"vLLM ended with {process.returncode}:\n{_tail(log)}"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return url
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"vLLM was not ready within {START_TIMEOUT_S} s:\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, then SIGKILL to what is left of its session."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]
