"""Every process of a stack, also those that have a session of their own or were left by their parents."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "E2E_STACK"  # an environment variable that the stack's processes inherit


@dataclass(frozen=True)
class Process:
    """pid and the time of its start, which together name a process for ever."""

    pid: int
    started: int  # clock ticks since boot
    parent: int
    session: int
    command: str

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Family:
    """What descends from one process: by parent, by session, or by the mark in its environment.

    No single one will do: some leave their parents, some their session, and some write over their environment.
    """

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._known: dict[tuple[int, int], Process] = {}

    def alive(self) -> list[Process]:
        """Those that run now, without the dead who wait to be reaped."""
        now = processes()
        members = {p.pid for p in now if (p.pid, p.started) in self._known or self._is_marked(p.pid)}
        while True:
            sessions = {p.session for p in now if p.pid in members}
            more = {p.pid for p in now if p.parent in members or p.session in sessions}
            if more <= members:
                break
            members |= more
        found = [p for p in now if p.pid in members]
        self._known |= {(p.pid, p.started): p for p in found}
        return found

    def wait_for_end(self, timeout_s: float) -> list[Process]:
        """Those that are still there when the time is over: none, if all is well."""
        deadline_s = time.monotonic() + timeout_s
        while (left := self.alive()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return left

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


def processes() -> list[Process]:
    """All that run on this machine."""
    found = (_read(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return [process for process in found if process is not None]


def kill_all(group: Iterable[Process]) -> None:
    for process in group:
        process.kill()


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    state, parent, session, started = stat[0], int(stat[1]), int(stat[3]), int(stat[19])
    return None if state in "ZX" else Process(pid, started, parent, session, command)
