"""Random faults under load on a real Ray: nothing acknowledged is lost, engines go on, all is seen again.

A real vLLM on two ranks is asked without end, and every reply must come and be what the first one was. Beside it
engines step and report while settings are changed over and over: random loads instead of a model, but settings agreed
and reported as in vLLM's workers, by their courier, which starts the agent. Faults: kill -9 of the actor, an agent
(vLLM's too), the control plane's bridge, an engine's workers, Ray's control store (GCS), its raylet; reports that fail
in the worker; the disk full for the state file. After each: every engine goes on stepping, and within RECOVERY_S of the
repair all are live again and run the newest change that was acknowledged (or one that was asked for later, and not
refused). One JSON line.

    python -m bench.scheduler.faults [--faults 200] [--without-vllm] [--append]
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bench.record import add_record
from bench.scheduler.running import ray_head
from bench.scheduler.served import Served
from llep.errors import LlepError, StoreUnavailable
from tests.scheduler.conftest import RayHead, RunningEngine, wait_for
from tests.scheduler.test_on_ray import Control

ENGINES = 3
FIRST_VALUE = 100  # of watchdog_s, which is what is changed: that many seconds no rank keeps another waiting
RECOVERY_S = 30.0
FAULTS = ("actor", "actor", "agent", "agent", "bridge", "workers", "reports", "disk", "gcs", "raylet")


class Campaign:
    """Engines, a control plane's client, and what was asked of the settings."""

    def __init__(
        self, head: RayHead, seed: int, recovery_limit_s: float = RECOVERY_S, served: Served | None = None
    ) -> None:
        self._head, self._rng, self._limit_s, self._served = head, random.Random(seed), recovery_limit_s, served
        self._engines = [
            RunningEngine(f"engine-{number}", head.folder, {"report_interval_s": 0.2}, has_own_agent=True)
            for number in range(ENGINES)
        ]
        self._reporting = [*self._engines, *([served] if served is not None else [])]
        self._control = Control()
        self._acknowledged = 0  # the newest value that a change was acknowledged with
        self._asked: set[int] = set()  # later ones, of which nobody knows
        self._value = FIRST_VALUE
        self.changes = self.unknown = 0
        self.seen: Counter[str] = Counter()
        self.recovery_s: list[tuple[str, float]] = []

    def start(self) -> None:
        for engine in self._engines:
            engine.start_workers()
        wait_for(self._control.answers, 60)
        wait_for(self._all_live, 60)

    def end(self) -> None:
        for engine in self._engines:
            engine.end()
        self._control.close()

    def run(self, faults: int) -> None:
        for _ in range(faults):
            self._change()
            fault = self._rng.choice(FAULTS)
            repaired_s = getattr(self, f"_{fault}")()
            for engine in self._engines:
                assert engine.goes_on(), f"{engine.name} stands still after {fault}"
            wait_for(self._is_well, self._limit_s + max(repaired_s - time.monotonic(), 0.0))
            if self._served is not None:
                assert not self._served.traffic.failures, f"requests failed: {fault}, {self._served.traffic.failures}"
            self.recovery_s.append((fault, time.monotonic() - repaired_s))
            print(f"{len(self.recovery_s)} {fault}: seen again after {self.recovery_s[-1][1]:.1f} s", file=sys.stderr)
            self.seen[fault] += 1

    def _change(self) -> None:
        """Ask for one more change; it may be lost only if it is not acknowledged."""
        self._value = FIRST_VALUE + (self._value + 1 - FIRST_VALUE) % 3000
        self._asked.add(self._value)
        try:
            self._control.call("patch_settings", {"watchdog_s": self._value}, "campaign", wait_s=0.5)
        except StoreUnavailable:
            self._asked.discard(self._value)  # refused: it must not come
            return
        except LlepError:
            self.unknown += 1
            return
        self._acknowledged, self._asked = self._value, set()
        self.changes += 1

    def _actor(self) -> float:
        self._control.kill_actor()
        with suppress(AssertionError):
            self._change()  # while it is away
        return time.monotonic()

    def _agent(self) -> float:
        agents = self._rng.choice(self._reporting).own_agents()
        assert agents, "no agent to kill"
        for pid in agents:
            os.kill(pid, signal.SIGKILL)
        self._change()
        return time.monotonic()

    def _workers(self) -> float:
        """As vLLM ends when a worker does, and is started anew."""
        engine = self._rng.choice(self._engines)
        engine.kill_workers()
        self._change()
        engine.start_workers()
        return time.monotonic()

    def _reports(self) -> float:
        """What makes them raises in the couriers' threads."""
        self._rng.choice(self._engines).fail_reports()
        self._change()
        return time.monotonic()

    def _bridge(self) -> float:
        bridge = self._control.client._bridge
        assert bridge is not None and bridge._process is not None
        os.kill(bridge._process.pid, signal.SIGKILL)
        return time.monotonic()

    def _disk(self) -> float:
        """No file of the actor's process may grow: to SQLite that is a full disk."""
        pid = int(self._control.call("status")["pid"])
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, hard))
        for _ in range(3):
            self._change()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        return time.monotonic()

    def _gcs(self) -> float:
        return self._ray_part("gcs_server")

    def _raylet(self) -> float:
        return self._ray_part("raylet/raylet")

    def _ray_part(self, name: str) -> float:
        """`ray start --block` ends when one of its processes has: started again, as a supervisor would."""
        for pid in _processes(name, self._head.process_group):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._change()
        time.sleep(self._rng.uniform(0.0, 3.0))
        self._head.kill()
        self._head.start()
        return time.monotonic()

    def _all_live(self) -> bool:
        return all(self._control.live_view(engine.name) for engine in self._reporting)

    def _is_well(self) -> bool:
        """All live, and all run what holds: nothing that was acknowledged is lost."""
        if not self._control.answers() or not self._all_live():
            return False
        assert len(self._control.call("engines")) == len(self._reporting), "an engine that is none"
        running = {int(engine.status()["settings"]["watchdog_s"]) for engine in self._engines}
        if len(running) != 1:
            return False
        (value,) = running
        if value not in self._asked | {self._acknowledged}:
            return False
        self._acknowledged, self._asked = value, set()
        return True


def _processes(name: str, group: int) -> list[int]:
    """Processes of a process group with `name` in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if name in command and os.getpgid(int(path.name)) == group:
                found.append(int(path.name))
    return found


def soak(faults: int, seed: int, recovery_limit_s: float, with_vllm: bool) -> dict[str, Any]:
    started_s = time.monotonic()
    with ray_head() as head, ExitStack() as stack:
        served = stack.enter_context(Served(head.folder)) if with_vllm else None
        campaign = Campaign(head, seed, recovery_limit_s, served)
        try:
            campaign.start()
            campaign.run(faults)
        finally:
            campaign.end()
    recovery_s = [seconds for _, seconds in campaign.recovery_s]
    return {
        "bench": "faults",
        "faults": faults,
        "seed": seed,
        "recovery_limit_s": recovery_limit_s,
        **dict(sorted(campaign.seen.items())),
        "changes_acknowledged": campaign.changes,
        "changes_unknown": campaign.unknown,
        "changes_lost": 0,
        "requests": served.traffic.answered if served is not None else 0,
        "requests_failed": len(served.traffic.failures) if served is not None else 0,
        "request_s_max": round(served.traffic.longest_s, 2) if served is not None else None,
        "engines_stopped": 0,
        "recovery_s_median": round(statistics.median(recovery_s), 2),
        "recovery_s_max": round(max(recovery_s), 2),
        "recovery_s_max_of": {
            name: round(max(seconds for fault, seconds in campaign.recovery_s if fault == name), 2)
            for name in sorted(campaign.seen)
        },
        "seconds": round(time.monotonic() - started_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recovery-s", type=float, default=RECOVERY_S, help="more on a machine that is busy otherwise")
    parser.add_argument("--without-vllm", action="store_true", help="ask no model")
    parser.add_argument("--append", action="store_true", help="keep the line in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    found = soak(arguments.faults, arguments.seed, arguments.recovery_s, not arguments.without_vllm)
    add_record("scheduler", found, append=arguments.append)


if __name__ == "__main__":
    main()
