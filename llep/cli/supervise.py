"""Processes that `llep serve` starts: each in a session of its own, ended with it, some started again when they die."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
LONGEST_RESTART_PAUSE_S = 20.0
STEADY_AFTER_S = 60.0
LOOK_EVERY_S = 0.05
FAREWELL_S = 3.0  # for processes that end by themselves once they notice that others did


class StopRequested(Exception):
    """Somebody asked us to end."""


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP, and acts on them only where it is safe: in `pause`.

    A signal that broke into the start of a process would leave an orphan.
    """

    def __init__(self) -> None:
        self._count = 0

    @property
    def is_urgent(self) -> bool:
        """Whether somebody has asked twice."""
        return self._count > 1

    def pause(self, seconds: float) -> None:
        """Sleep. Raises StopRequested, within a fraction of a second, if somebody asks us to end."""
        deadline_s = time.monotonic() + seconds
        while not self._count and (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_EVERY_S))
        if self._count:
            raise StopRequested

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Signals are counted inside, and do what they did before afterwards."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1


def never() -> bool:
    return False


@dataclass(slots=True)
class Child:
    """One process with what it starts itself. log: where its output goes; None is where ours goes."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None
    stop_s: float = 10.0  # what it may take to end in good order
    group_nice: int = 0  # of its whole session, where Linux groups processes by session; higher yields to the others
    process: subprocess.Popen[bytes] | None = None
    _started_s: float = field(default=0.0, init=False)
    _pause_s: float = field(default=1.0, init=False)

    def start(self) -> None:
        output = None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("ab")
        # A session of its own: Ctrl-C reaches only `llep serve`, which ends everything in good order.
        self.process = subprocess.Popen(
            list(self.command),
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self._started_s = time.monotonic()
        if output:
            output.close()
        if self.group_nice:
            with contextlib.suppress(OSError):  # no such groups here
                Path(f"/proc/{self.process.pid}/autogroup").write_text(str(self.group_nice))

    @property
    def status(self) -> int | None:
        """None while it runs; else its exit status (negative: the signal that ended it)."""
        assert self.process is not None
        return self.process.poll()

    def is_due_again(self) -> bool:
        """Whether a dead child may be started again; pauses grow while it keeps dying."""
        lived_s = time.monotonic() - self._started_s
        if lived_s > STEADY_AFTER_S:
            self._pause_s = 1.0
        if lived_s < self._pause_s:
            return False
        self._pause_s = min(2 * self._pause_s, LONGEST_RESTART_PAUSE_S)
        return True

    def restart(self) -> None:
        """Start it again once it has died; what it left behind would be in the way of the new one."""
        assert self.process is not None
        _kill_session(self.process.pid)
        self.start()

    def stop(self, is_urgent: Callable[[], bool] = never) -> None:
        """SIGTERM, then SIGKILL to all that is left of its session when stop_s is over or things get urgent."""
        if self.process is None:
            return
        shared_memory = _shared_memory(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        deadline_s = time.monotonic() + self.stop_s
        while self.process.poll() is None and time.monotonic() < deadline_s and not is_urgent():
            time.sleep(LOOK_EVERY_S)
        _kill_session(self.process.pid)
        self.process.wait()
        for file in shared_memory:  # vLLM kills its own workers, whose shared memory then stays for ever
            file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last line of its log; '' without one."""
        try:
            lines = self.log.read_text(errors="replace").split("\n") if self.log is not None else []
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def sweep(variable: str, value: str, is_urgent: Callable[[], bool] = never) -> None:
    """End every process that inherited this environment variable, after a moment in which it may end by itself."""
    mark = os.fsencode(f"{variable}={value}")
    deadline_s = time.monotonic() + FAREWELL_S
    while any(_marked(mark)) and time.monotonic() < deadline_s and not is_urgent():
        time.sleep(LOOK_EVERY_S)
    _kill(lambda: _marked(mark))


def end_with_parent() -> None:
    """In the child, before it starts: be told to end should `llep serve` be killed. Linux only; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _shared_memory(session: int) -> set[Path]:
    """Files of shared memory that a session's processes have open now."""
    found: set[Path] = set()
    for pid in _in_session(session):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            found |= {Path(name) for name in _SHARED_MEMORY.findall(maps)}
    return found


_SHARED_MEMORY = re.compile(r" (/dev/shm/\S+)$", re.MULTILINE)


def _kill_session(session: int) -> None:
    _kill(lambda: _in_session(session))


def _kill(find: Callable[[], Iterable[int]]) -> None:
    """SIGKILL to all that are found, and to those that they were just about to start."""
    for _ in range(3):
        found = list(find())
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _in_session(session: int) -> Iterator[int]:
    """vLLM's and Ray's children have process groups of their own, but stay in their session."""
    return (pid for pid in _processes() if _session_of(pid) == session)


def _marked(mark: bytes) -> Iterator[int]:
    return (pid for pid in _processes() if pid != os.getpid() and mark in _environment_of(pid))


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _environment_of(pid: int) -> list[bytes]:
    """Empty for those of others, and for the dead who wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
