"""Memory of the scheduler's windows when every ring is full: engines that have reported for 12 hours, without Ray.

Time is simulated: a report every 10 s for the finer rings, then one a minute. One JSON line a case.

    python -m bench.scheduler.memory [--append]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from bench.record import add_record
from bench.scheduler.engines import SimulatedEngine
from bench.scheduler.running import Usage
from llep.scheduler.admit import decode
from llep.scheduler.totals import EXPERT_MINUTES, EXPERT_ROWS, EXPERT_SECONDS, RANK_STEPS
from llep.scheduler.windows import Windows

CASES = [(64, 8), (40, 64)]
SECONDS = [step_s * rows for step_s, rows in RANK_STEPS]


def measure(engines: int, ranks: int, layers: int, experts: int) -> dict[str, Any]:
    usage = Usage(os.getpid())
    before = usage.private_bytes
    windows, now_s, taken, cpu_s = Windows(), 0.0, 0, 0.0
    for number in range(engines):
        engine = SimulatedEngine(f"engine-{number}", ranks=ranks, layers=layers, experts=experts, seed=0)
        now_s = 0.0
        while now_s < SECONDS[-1]:
            left_s = SECONDS[-1] - now_s
            now_s += RANK_STEPS[0][0] if left_s <= SECONDS[0] else RANK_STEPS[1][0] if left_s <= SECONDS[1] else 60.0
            data = engine.report_of_group()
            started_s = time.process_time()
            windows.take(decode(data), now_s)
            cpu_s += time.process_time() - started_s
            taken += 1
    known = next(iter(windows.engines.values()))
    assert [len(ring) for ring in known.totals._expert_rings] == [EXPERT_SECONDS, EXPERT_ROWS, EXPERT_MINUTES]
    return {
        "bench": "memory",
        "engines": engines,
        "ranks": ranks,
        "layers": layers,
        "experts": experts,
        "hours": SECONDS[-1] / 3600,
        "private_mb": round((usage.private_bytes - before) / 1e6),
        "mb_per_engine": round((usage.private_bytes - before) / 1e6 / engines, 2),
        "cpu_us_per_report_of_rank_0": round(1e6 * cpu_s / taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, help="instead of all; memory grows in proportion")
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    for engines, ranks in CASES:
        found = measure(arguments.engines or engines, ranks, 58, 256)
        add_record("scheduler", found, append=arguments.append)


if __name__ == "__main__":
    main()
