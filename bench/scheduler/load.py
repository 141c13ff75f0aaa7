"""How much of a core and of memory the scheduler takes while many engines report once per second, through a real Ray.

Agents are simulated in one process of their own: each engine's reports of a second go to the actor in one call, as its
agent sends them. A report counts as lost if the scheduler did not take it or missed its number. One JSON line a case.

    python -m bench.scheduler.load [--seconds 60] [--append]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from bench.record import add_record
from bench.scheduler.engines import SimulatedEngine, report_bytes
from bench.scheduler.running import Usage, ray_head, scheduler

# (engines, ranks of each, MoE layers, experts)
CASES = [(64, 8, 58, 256), (40, 64, 58, 256)]
WARM_UP_S = 15.0
INTERVAL_S = 1.0


async def drive(actor: Any, engines: list[SimulatedEngine], seconds: float) -> dict[str, Any]:
    """Report for WARM_UP_S, then for the seconds that count."""
    latencies: list[float] = []
    sent = refused = 0

    async def report_for_ever(engine: SimulatedEngine, offset_s: float) -> None:
        nonlocal sent, refused
        next_s = time.monotonic() + offset_s
        while True:
            await asyncio.sleep(max(next_s - time.monotonic(), 0.0))
            reports = engine.reports()
            start_s = time.monotonic()
            answer = await actor.report.remote(reports, 0)
            latencies.append(time.monotonic() - start_s)
            sent += len(reports)
            refused += len(answer["refused"])
            next_s += INTERVAL_S

    tasks = [
        asyncio.create_task(report_for_ever(engine, INTERVAL_S * number / len(engines)))
        for number, engine in enumerate(engines)
    ]
    await asyncio.sleep(WARM_UP_S)
    status = await actor.status.remote()
    usage, before, sent_before = Usage(status["pid"]), status["reports_total"], sent
    latencies.clear()
    started_s = time.monotonic()
    await asyncio.sleep(seconds)
    core_ratio, seconds = usage.core_ratio, time.monotonic() - started_s
    status = await actor.status.remote()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(await actor.engines.remote()) == len(engines)
    return {
        "seconds": round(seconds, 1),
        "reports_per_s": round((status["reports_total"] - before) / seconds, 1),
        "reports_sent": sent - sent_before,
        "reports_refused": refused,
        "reports_lost": status["reports_lost"],
        "core_ratio": round(core_ratio, 3),
        "resident_mb": round(usage.resident_bytes / 1e6),
        "private_mb": round(usage.private_bytes / 1e6),
        "call_p50_ms": round(1e3 * statistics.median(latencies), 1),
        "call_p99_ms": round(1e3 * statistics.quantiles(latencies, n=100)[98], 1),
    }


def measure(engines: int, ranks: int, layers: int, experts: int, seconds: float) -> dict[str, Any]:
    simulated = [
        SimulatedEngine(f"engine-{number}", ranks=ranks, layers=layers, experts=experts, seed=number)
        for number in range(engines)
    ]
    first, other = report_bytes(simulated[0])
    with ray_head() as head, scheduler(head) as actor:
        found = asyncio.run(drive(actor, simulated, seconds))
    case = {"engines": engines, "ranks": ranks, "layers": layers, "experts": experts}
    return {"bench": "load", **case, "report_bytes_rank_0": first, "report_bytes_other": other, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this one")
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/scheduler.jsonl")
    arguments = parser.parse_args()
    chosen = CASES if arguments.case is None else [CASES[arguments.case]]
    for case in chosen:
        add_record("scheduler", measure(*case, arguments.seconds), append=arguments.append)


if __name__ == "__main__":
    main()
