"""Long runs over real processes: the layer for many random steps, and ranks that die, stall or are misled.

`make test` runs a short share of each (tests/dist). One JSON line each.

    python -m bench.soak [layer faults changes] [--steps 1000] [--faults 40] [--changes 1000]
        [--layouts data-parallel tensor-parallel] [--append]
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.moe.workspace import Workspace
from tests.dist.ranks import start_ranks
from tests.dist.test_layer import hurt, misled, sharded, verified
from tests.dist.test_replicas import followed
from tests.following import assert_followed

RANKS, EXPERTS = 4, 16
LAYOUTS = ("data-parallel", "tensor-parallel")
HOUR_S = 3600.0
QUARTERS = 4
WARM_STEPS = 1000  # until everything that stays has been allocated, torch's log of its last 2000 collectives for one


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def grow(rank: int, size: int, steps: int) -> tuple[float, int, list[int]]:
    """(worst relative error, steps that lent, bytes by which this process grew in each quarter after WARM_STEPS).

    A tenth of a KiB a step is this test's own record of digests.
    """
    resident: list[int] = []

    def look(step: int) -> None:
        if step >= WARM_STEPS and (step - WARM_STEPS) % (steps // QUARTERS) == 0:
            resident.append(resident_bytes())

    workspace = Workspace(chunk_rows=64, wire_rows=96)
    worst, digests = sharded(rank, size, EXPERTS, False, "quota", WARM_STEPS + steps, workspace, look)
    resident.append(resident_bytes())
    lends = Counter(name for name, _ in digests)["lend"]
    return worst, lends, [after - before for before, after in pairwise(resident)]


def soak_layer(steps: int) -> dict[str, Any]:
    start_s = time.monotonic()
    found = start_ranks(grow, RANKS, steps, timeout_s=HOUR_S)
    worst = max(error for error, _, _ in found)
    assert worst < 1e-5, f"an output differs by {worst}"
    return {
        "soak": "layer",
        "ranks": RANKS,
        "steps": WARM_STEPS + steps,
        "steps_that_lent": found[0][1],
        "worst_relative_error": worst,
        "growth_bytes_by_quarter": [max(growth) for growth in zip(*(each[2] for each in found), strict=True)],
        "seconds": round(time.monotonic() - start_s),
    }


def soak_faults(faults: int) -> dict[str, Any]:
    """Each kind of fault in turn, at random moments, on the last of three ranks; each must have its outcome.

    A rank that dies, stalls or holds other counts ends all with a message that names it; wrong weights are found.
    """
    rng, seen = random.Random(0), Counter[str]()
    kinds = [(fault, where) for fault in ("kill", "stall") for where in ("gather", "start_lends", "exchange", "_wait")]
    kinds += [
        (fault, tokens) for fault in ("corrupt counts", "corrupt weights") for tokens in ("sharded", "replicated")
    ]
    start_s = time.monotonic()
    for number in range(faults):
        fault, where = kinds[number % len(kinds)]
        if fault == "corrupt counts":
            said = start_ranks(misled, 3, rng.randrange(12), where == "replicated")
            assert all("EP rank 2 holds other" in message for message in said), f"{fault}, {where}: {said}"
        elif fault == "corrupt weights":
            found = start_ranks(verified, 2, where == "replicated", True)
            assert not any(is_equal for _, is_equal, _ in found), f"{fault}, {where}: {found}"
        else:
            said = start_ranks(hurt, 3, where, fault, rng.randrange(12), lost=(2,))
            assert all("EP rank 2 stopped or stalled" in message for message in said[:2]), f"{fault}, {where}: {said}"
        seen[f"{fault}, {where.strip('_')}"] += 1
    return {
        "soak": "faults",
        "faults": faults,
        "as_expected": faults,
        **dict(sorted(seen.items())),
        "seconds": round(time.monotonic() - start_s),
    }


def soak_changes(changes: int, layouts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Random changes of settings and placements, at other times on each rank, weights loaded anew among them."""
    for layout in layouts:
        start_s = time.monotonic()
        found = start_ranks(followed, RANKS, changes, 1, layout == "tensor-parallel", timeout_s=HOUR_S)
        assert_followed(found)
        first = found[0]
        yield {
            "soak": "changes",
            "layout": layout,
            "ranks": RANKS,
            "changes": changes,
            "refused": len(first.refusals),
            "revisions_live": len({revision for revision, _, _ in first.live}),
            "placements_live": len({placement for _, placement, _ in first.live}),
            "steps": len(first.live),
            "layer_steps": dict(sorted(first.decisions.items())),
            "worst_relative_error": max(each.worst for each in found),
            "seconds": round(time.monotonic() - start_s),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("soaks", nargs="*", help="layer, faults, changes; all by default")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="that changes are made in")
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/soak.jsonl")
    arguments = parser.parse_args()
    soaks: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "layer": lambda: [soak_layer(arguments.steps)],
        "faults": lambda: [soak_faults(arguments.faults)],
        "changes": lambda: soak_changes(arguments.changes, arguments.layouts),
    }
    for soak in arguments.soaks or soaks:
        for line in soaks[soak]():
            add_record("soak", line, append=arguments.append)


if __name__ == "__main__":
    main()
