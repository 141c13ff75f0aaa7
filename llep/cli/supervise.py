"""Processes that `llep serve` starts: each in a session of its own, ended with it, some started again when they die."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
LONGEST_RESTART_PAUSE_S = 20.0
STEADY_AFTER_S = 60.0


@dataclass(slots=True)
class Child:
    """One process with what it starts itself. log: where its output goes; None is where ours goes."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None
    stop_s: float = 10.0  # what it may take to end in good order
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
            preexec_fn=_end_with_parent,
        )
        self._started_s = time.monotonic()
        if output:
            output.close()

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

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to all that is left of its session."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.stop_s)
        _kill_session(self.process.pid)
        self.process.wait()


def _end_with_parent() -> None:
    """In the child, before it starts: be told to end should `llep serve` be killed. Linux only; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_session(session: int) -> None:
    """SIGKILL to every process of a session: vLLM's and Ray's children have process groups of their own."""
    for _ in range(3):
        left = [pid for pid in _processes() if _session_of(pid) == session]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
