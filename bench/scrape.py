"""What does a scrape of /metrics cost the control plane: one engine of 8 ranks, and 64 of them?

`python -m bench.scrape --append` adds the lines to bench/results/scrape.jsonl. Ray's part is left out: the scheduler
runs in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.messages import encode
from llep.scheduler.actor import Scheduler as Actor
from llep_server.metrics import KEEP_S, Exposition
from llep_server.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from reporting import Engine

LAYERS, EXPERTS, RANKS = 36, 128, 8  # gpt-oss-120b
REPEATS = 15


class InProcess:
    """Calls the scheduler as the control plane's client does, without Ray."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    async def call(self, method: str, **arguments: Any) -> Any:
        return await getattr(self._actor, method)(**arguments)


async def measure(engines: int) -> dict[str, Any]:
    """Milliseconds from asking for a page to having it, when none is kept; and what is on it."""
    with tempfile.TemporaryDirectory() as folder:
        actor = Actor(folder)
        for index in range(engines):
            engine = Engine(
                name=f"engine-{index}", ep_size=RANKS, layer_numbers=tuple(range(LAYERS)), num_experts=EXPERTS
            )
            engine.run()
            answer = await actor.report([encode(report) for report in engine.reports()], 0)
            assert answer["refused"] == []
        exposition = Exposition(Scheduler(InProcess(actor)))
        times_ms, cpu_ms, page = [], [], b""
        for _ in range(REPEATS):
            await asyncio.sleep(KEEP_S)  # a page is kept so long
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            page, _ = await exposition.page("")
            times_ms.append((time.perf_counter() - start_s) * 1e3)
            cpu_ms.append((time.process_time() - start_cpu_s) * 1e3)
    series = sum(not line.startswith(b"#") for line in page.splitlines())
    return {
        **{"engines": engines, "ranks": RANKS, "layers": LAYERS, "experts": EXPERTS},
        **{"series": series, "bytes": len(page)},
        **{"min_ms": round(min(times_ms), 1), "p50_ms": round(statistics.median(times_ms), 1)},
        "max_ms": round(max(times_ms), 1),
        "cpu_p50_ms": round(statistics.median(cpu_ms), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--append", action="store_true", help="add the lines to bench/results/scrape.jsonl")
    append = parser.parse_args().append
    for engines in (1, 64):
        add_record("scrape", asyncio.run(measure(engines)), append=append)


if __name__ == "__main__":
    main()
