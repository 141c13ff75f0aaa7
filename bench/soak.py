"""Long runs over real processes: the layer for many random steps, and ranks that die or stall at random moments.

`make test` runs a short share of each (tests/dist). One JSON line each.

    python -m bench.soak [layer faults] [--steps 1000] [--faults 40] [--append]
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.moe.workspace import Workspace
from tests.dist.ranks import start_ranks
from tests.dist.test_layer import hurt, sharded

RANKS, EXPERTS = 4, 16
HOUR_S = 3600.0
WARM_STEPS = 100  # until everything that stays has been allocated


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def grow(rank: int, size: int, steps: int) -> tuple[float, int, int]:
    """(worst relative error, steps that lent, bytes by which this process grew after WARM_STEPS)."""
    workspace = Workspace(chunk_rows=64, wire_rows=96)
    sharded(rank, size, EXPERTS, False, "quota", WARM_STEPS, workspace)
    before = resident_bytes()
    worst, digests = sharded(rank, size, EXPERTS, False, "quota", steps, workspace)
    return worst, Counter(name for name, _ in digests)["lend"], resident_bytes() - before


def soak_layer(steps: int) -> dict[str, Any]:
    start_s = time.monotonic()
    found = start_ranks(grow, RANKS, steps, timeout_s=HOUR_S)
    worst, lends, growth = (max(values) for values in zip(*found, strict=True))
    assert worst < 1e-5, f"an output differs by {worst}"
    return {
        "soak": "layer",
        "ranks": RANKS,
        "steps": steps,
        "steps_that_lent": lends,
        "worst_relative_error": worst,
        "growth_bytes": growth,
        "seconds": round(time.monotonic() - start_s),
    }


def soak_faults(faults: int) -> dict[str, Any]:
    """Each fault must end both healthy ranks with a message that names the third."""
    rng, seen = random.Random(0), Counter[str]()
    for _ in range(faults):
        where, fault = rng.choice(["gather", "start_lends", "exchange", "_wait"]), rng.choice(["kill", "stall"])
        said = start_ranks(hurt, 3, where, fault, rng.randrange(12), lost=(2,))
        for message in said[:2]:
            assert "EP rank 2 stopped or stalled" in message, f"{where} {fault}: {message}"
        seen[f"{fault} in {where.strip('_')}"] += 1
    return {"soak": "faults", "faults": faults, "named": faults, **dict(sorted(seen.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("soaks", nargs="*", help="layer, faults; all by default")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/soak.jsonl")
    arguments = parser.parse_args()
    for soak in arguments.soaks or ["layer", "faults"]:
        found = soak_layer(arguments.steps) if soak == "layer" else soak_faults(arguments.faults)
        add_record("soak", found, append=arguments.append)


if __name__ == "__main__":
    main()
