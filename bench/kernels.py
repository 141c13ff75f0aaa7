"""How one rank's experts are best computed here: one after another, in what portions, or all in a grouped kernel.

Milliseconds, the least of several runs, on one thread: of one expert after the other with at most so many rows at a
time, and of torch._grouped_mm. One JSON line a case.

    python -m bench.kernels [--append]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.record import add_record
from llep.moe import swiglu
from llep.moe.swiglu import SwigluExperts

HIDDEN = 1024
PORTIONS = (128, 512, 2048)
CASES = (  # rows of each expert: one that gets all, as many for each, decode
    [2048],
    [256] * 8,
    [1024, 512, 256, 128, 64, 32, 16, 16],
    [4] * 16,
)


def least_ms(work: Callable[[], object], repeats: int = 5) -> float:
    times_s = []
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return round(1e3 * min(times_s[1:]), 2)


def measure(rows: list[int], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    experts = SwigluExperts(
        (torch.randn(len(rows), 2 * HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
        (torch.randn(len(rows), HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
    )
    rows_PH = torch.randn(sum(rows), HIDDEN, generator=generator).to(dtype)
    gates_P = torch.ones(len(rows_PH), dtype=dtype)
    experts_G, counts_G = np.arange(len(rows)), np.array(rows)
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rows": rows}
    for portion in PORTIONS:
        swiglu.ROWS_AT_A_TIME = portion
        found[f"portions_of_{portion}_ms"] = least_ms(
            lambda: experts.compute(experts.weights, rows_PH, experts_G, counts_G, gates_P)
        )
    found["grouped_ms"] = least_ms(lambda: experts._compute_grouped(experts.weights, rows_PH, experts_G, counts_G))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/kernels.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in CASES:
            add_record("kernels", measure(rows, dtype), append=arguments.append)


if __name__ == "__main__":
    main()
