"""How soon a change of settings is live on all ranks of an engine under load, at reports every 0.1 s, on a real Ray.

One engine steps every 20 ms (agent and workers in processes of their own); settings change again and again; measured is
from the call to the answer that it is live on all ranks, through the client that the control plane uses. One JSON line.

    python -m bench.scheduler.latency [--changes 100] [--append]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from bench.record import add_record
from bench.scheduler.running import ray_head
from tests.scheduler.conftest import RunningEngine, wait_for
from tests.scheduler.test_on_ray import Control


def measure(changes: int) -> dict[str, Any]:
    with ray_head() as head:
        engine = RunningEngine("changing", head.folder, {"report_interval_s": 0.1})
        control = Control()
        try:
            engine.start_agent()
            engine.start_workers()
            wait_for(control.answers, 60)
            wait_for(lambda: control.live_view("changing"), 60)
            seconds, states = [], []
            for number in range(changes):
                start_s = time.monotonic()
                change = control.call("patch_settings", {"watchdog_s": 10 + number}, "bench", wait_s=10.0)
                seconds.append(time.monotonic() - start_s)
                states += [applied["state"] for applied in change["applied"]]
        finally:
            engine.end()
            control.close()
    return {
        "bench": "latency",
        "changes": changes,
        "live": states.count("live"),
        "report_interval_s": 0.1,
        "live_p50_s": round(statistics.median(seconds), 3),
        "live_p95_s": round(statistics.quantiles(seconds, n=20)[18], 3),
        "live_max_s": round(max(seconds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--append", action="store_true", help="keep the line in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    add_record("scheduler", measure(arguments.changes), append=arguments.append)


if __name__ == "__main__":
    main()
