"""A Ray of its own for a module, and the processes of an engine: an agent and the workers that talk to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0


def wait_for(what: Callable[[], Any], timeout_s: float = 30.0, every_s: float = 0.1) -> Any:
    """The first true answer of what(). Fails when the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(every_s)
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


class RayHead:
    """`ray start --head` in a session of its own, ended by its process group."""

    def __init__(self, folder: Path, object_store_bytes: int = 80_000_000, num_gpus: int = 0) -> None:
        self.folder = folder
        self._object_store_bytes = object_store_bytes
        self._num_gpus = num_gpus  # that it believes in
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def process_group(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it listens."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={self.port}"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"),
            *(f"--temp-dir={self.folder}", f"--object-store-memory={self._object_store_bytes}"),
            f"--num-gpus={self._num_gpus}",
        ]
        with (self.folder / "out.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._listens, START_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        if self._process is not None:
            kill_session(self._process)
            self._process = None

    def _listens(self) -> bool:
        assert self._process is not None and self._process.poll() is None, (self.folder / "out.log").read_text()[-2000:]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class RayNode:
    """One more node of a head's cluster, in a session of its own, with resources that the head lacks."""

    def __init__(self, head: RayHead, resources: dict[str, float]) -> None:
        self._head, self._resources = head, resources
        self._log = head.folder / "node.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it has joined."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self._head.address}"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"),
            *(f"--resources={json.dumps(self._resources)}", "--object-store-memory=80000000"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._has_joined, 2 * START_TIMEOUT_S)

    def _has_joined(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log.read_text()[-2000:]
        return "Ray runtime started" in self._log.read_text()

    def has(self, pid: int) -> bool:
        """Whether a process descends from it."""
        assert self._process is not None
        while pid > 1 and pid != self._process.pid:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == self._process.pid

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        if self._process is not None:
            kill_session(self._process)
            self._process = None


@dataclass
class RunningEngine:
    """Workers that step for ever, and the agent beside them. has_own_agent: they start it, and again when it ends."""

    name: str
    folder: Path
    start: dict[str, Any] = field(default_factory=dict)
    has_own_agent: bool = False
    agent: subprocess.Popen[bytes] | None = None
    workers: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def _socket(self) -> str:
        """Another for each life of the workers, if the agent goes with them."""
        return str(self.folder / (f"{self.name}-{self.starts}.sock" if self.has_own_agent else f"{self.name}.sock"))

    def start_agent(self) -> None:
        command = [*(sys.executable, "-m", "llep.scheduler.agent", "--socket", self._socket, "--engine", self.name)]
        with (self.folder / f"{self.name}.agent.log").open("ab") as log:
            self.agent = subprocess.Popen([*command, "--parent-pid", str(os.getpid())], stderr=log)

    def start_workers(self) -> None:
        self.starts += 1
        self._status_file.unlink(missing_ok=True)
        start = [text for key, value in self.start.items() for text in (f"--{key}", json.dumps(value))]
        command = [sys.executable, "-m", "tests.scheduler.peer", "--socket", self._socket, "--engine", self.name]
        options = ["--status", str(self._status_file), *(["--agent"] if self.has_own_agent else []), *start]
        with (self.folder / f"{self.name}.agent.log").open("ab") as log:
            self.workers = subprocess.Popen([*command, *options], cwd=REPO, stderr=log)
        wait_for(self._status_file.exists)

    def kill_workers(self) -> None:
        assert self.workers is not None
        self.workers.kill()
        self.workers.wait()

    def own_agents(self) -> list[int]:
        """Processes that the workers have started."""
        assert self.workers is not None
        lists = Path(f"/proc/{self.workers.pid}/task").glob("*/children")
        return [int(pid) for children in lists for pid in children.read_text().split()]

    def fail_reports(self) -> None:
        """The next reports of every rank's courier fail."""
        assert self.workers is not None
        self.workers.send_signal(signal.SIGUSR1)

    def kill_agent(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        self.agent.wait()

    def agent_log(self) -> str:
        return (self.folder / f"{self.name}.agent.log").read_text()

    def status(self) -> dict[str, Any]:
        """{"step", "revision", "mode", "settings"} as the workers run now."""
        return dict(json.loads(self._status_file.read_text()))

    def goes_on(self) -> bool:
        """Whether its steps do, within a second."""
        step = self.status()["step"]
        deadline_s = time.monotonic() + 1.0
        while time.monotonic() < deadline_s:
            if self.status()["step"] > step:
                return True
            time.sleep(0.02)
        return False

    def end(self) -> None:
        for process in (self.workers, self.agent):
            if process is not None:
                process.kill()
                process.wait()
        self._status_file.unlink(missing_ok=True)
        Path(self._socket).unlink(missing_ok=True)

    @property
    def _status_file(self) -> Path:
        return self.folder / f"{self.name}.status"


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="llep-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_head(short_folder: Path) -> Iterator[RayHead]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("LLEP_RAY_NAMESPACE", "llep-test")
        environment.setenv("LLEP_STATE_DIR", str(short_folder / "state"))
        head = RayHead(short_folder)
        environment.setenv("LLEP_RAY_ADDRESS", head.address)
        try:
            head.start()
            yield head
        finally:
            head.kill()


@pytest.fixture
def make_engine(short_folder: Path) -> Iterator[Callable[..., RunningEngine]]:
    """Starts engines, agent and workers, and ends them after the test."""
    engines: list[RunningEngine] = []

    def make(name: str, **start: Any) -> RunningEngine:
        engine = RunningEngine(name, short_folder, {"report_interval_s": 0.2, **start})
        engines.append(engine)
        engine.start_agent()
        engine.start_workers()
        return engine

    yield make
    for engine in engines:
        engine.end()
