"""`llep serve` as a user starts it: a process with all that it starts, its log, and ways to ask it things."""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from llep.cli.supervise import end_with_parent
from tests.e2e.processes import MARK, Family, Process, kill_all
from tests.vllm.engine import free_port

LAYERS, TOP_K = 4, 4  # of the model that the tests serve
LLEP = Path(sys.executable).with_name("llep")
START_TIMEOUT_S = 300.0
RETRY_S = 30.0  # where others take the cores the scheduler may answer late
METRIC_WITHIN_S = 60.0
PAUSE_S = 0.5  # between requests: what was killed needs the cores too, to come back
TP_EP = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
DP_EP = ("--data-parallel-size", "2", "--enable-expert-parallel")
# So that every batch with a few tokens is balanced, and what happens is seen at once.
EAGER_TO_LEND = {"LLEP_MIN_BATCH_TOKENS": "16", "LLEP_MIN_CHUNK_TOKENS": "8", "LLEP_REPORT_INTERVAL_S": "0.2"}
VLLM = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "4096"),
    *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
)


def clean_environment(**more: str) -> dict[str, str]:
    """Ours, without what would steer llep. What vLLM compiles in its first request it finds again in the next stack."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("LLEP_", "RAY_", "VLLM_"))}
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return {"TORCHINDUCTOR_CACHE_DIR": str(compiled)} | ours | more


class Stack:
    """`llep serve MODEL` on free ports, with a state folder of its own. Use it in `with`: nothing is left after it."""

    def __init__(self, model: Path, folder: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        self.log = folder / "serve.log"
        self.api_port, self.control_plane_port = free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.api_port}"
        self.control_plane = f"http://127.0.0.1:{self.control_plane_port}"
        mark = secrets.token_hex(8)
        self.family = Family(mark)
        self._command = [
            *(str(LLEP), "serve", str(model), "--port", str(self.api_port)),
            *("--control-plane-port", str(self.control_plane_port), "--state-dir", str(folder / "state"), *flags),
        ]
        self._environment = clean_environment(**{MARK: mark}, TMPDIR=str(folder), **environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # should the tests themselves be killed
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _ in range(3):  # some start others while they are being ended
            kill_all(self.family.alive())
            time.sleep(0.1)
        self.process.wait()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_serving(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until `llep serve` says so."""
        deadline_s = time.monotonic() + timeout_s
        while "Ctrl-C ends everything" not in self.said():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()[-6000:]}"
            assert time.monotonic() < deadline_s, f"not ready within {timeout_s} s:\n{self.said()[-6000:]}"
            time.sleep(0.5)
        self.family.alive()

    def wait_for(self, what: Callable[[], Any], timeout_s: float, name: str = "") -> Any:
        """The first true answer of what(). Fails when the time is over, with `name`."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < deadline_s, f"{name} not within {timeout_s} s:\n{self.said()[-6000:]}"
            time.sleep(0.25)
        return found

    def metric(self, name: str) -> Any:
        """One family of metrics(); waits for it, since an engine that is late is not shown for a while."""
        return self.wait_for(lambda: self.metrics().get(name), METRIC_WITHIN_S)

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def wait_for_end(self, timeout_s: float) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def ray_starts(self) -> int:
        """How often Ray said that it runs now."""
        return (self.folder / "state" / "logs" / "ray.log").read_text(errors="replace").count("Ray runtime started")

    def children(self, *words: str) -> list[Process]:
        """Processes of the stack whose command has all of these words."""
        return [p for p in self.family.alive() if all(word in p.command for word in words)]

    def child(self, *words: str) -> Process:
        found = self.children(*words)
        assert len(found) == 1, f"{words}: {found}"
        return found[0]

    def environment(self, name: str) -> str:
        """What its control plane was told in this variable."""
        variables = Path(f"/proc/{self.child('-m llep_server').pid}/environ").read_bytes().split(b"\0")
        return dict(variable.decode().split("=", 1) for variable in variables if variable)[name]

    # What one asks it.

    def get(self, path: str, **query: Any) -> Any:
        return self._ask("GET", path, params=query)

    def patch(self, **settings: Any) -> Any:
        """Change settings over HTTP; every engine runs them when it returns, or from the next step on."""
        return self._ask("PATCH", "/v1/settings", json=settings)

    def post(self, path: str, **values: Any) -> Any:
        return self._ask("POST", path, json=values)

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        """The answer; a scheduler that can't be reached at first is asked again, as the error says."""
        deadline_s = time.monotonic() + RETRY_S
        while True:
            response = httpx.request(method, f"{self.control_plane}{path}", timeout=20, **more)
            is_late = response.status_code == 503 and response.json()["error"]["code"] == "scheduler_unreachable"
            if not is_late or time.monotonic() > deadline_s:
                assert response.status_code == 200, response.text
                return response.json()
            time.sleep(0.5)

    def loads(self, window_s: float = 60) -> dict[str, Any]:
        (loads,) = self.get("/v1/loads", window_s=window_s)["data"]
        return dict(loads)

    def engine(self) -> dict[str, Any]:
        (engine,) = self.get("/v1/engines")["data"]
        return dict(engine)

    def ranks_at(self, revision: int) -> list[dict[str, Any]]:
        """All ranks, once all of them run this revision; none before."""
        ranks = self.engine()["ranks"]
        return ranks if all(rank["live_revision"] == revision for rank in ranks) else []

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """name -> labels (without the engine's) -> value, as Prometheus would read it."""
        response = httpx.get(f"{self.control_plane}/metrics", timeout=20)
        assert response.status_code == 200, response.text
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
                found[sample.name][tuple(sorted(labels.items()))] = sample.value
        return dict(found)

    def llep(self, *arguments: str, expect: int = 0) -> str:
        """What the command line prints when it is asked about this stack."""
        done = subprocess.run(
            [str(LLEP), *arguments, "--server", self.control_plane],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == 0 else done.stderr

    def llep_json(self, *arguments: str) -> Any:
        return json.loads(self.llep(*arguments, "-o", "json"))

    def curls(self) -> list[str]:
        """The commands that `llep serve` proposes to try."""
        return re.findall(r"^ +(curl .*)$", self.said(), re.MULTILINE)


class Traffic:
    """Requests one after the other in a thread of its own, as long as the block lasts."""

    def __init__(self, send: Callable[[], Any], pause_s: float = PAUSE_S) -> None:
        self._send = send
        self._pause_s = pause_s
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answered = 0
        self.failures: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._ends.is_set():
            start_s = time.monotonic()
            try:
                self._send()
                self.answered += 1
            except Exception as error:
                self.failures.append(repr(error))
            self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            self._ends.wait(self._pause_s)
