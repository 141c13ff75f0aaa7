"""What a GPU spends per layer and rank under the paper's scenarios, and what planning and index lists cost its host.

One GPU plays one rank after the other: real weights, real kernels (grouped GEMMs of bfloat16), the rows that the plan
gives each rank. No links: a lend is a copy on the device, timed beside. One JSON line a case.

    python -m bench.gpu [--shape gpt-oss-120b deepseek-v3] [--ranks 8] [--tokens 8192] [--repeats 20] [--append]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.record import add_record
from llep.generate import Workload, generate_steps
from llep.moe.dispatch import Banks, Index, Shares
from llep.moe.swiglu import SwigluExperts
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step, warm_up
from llep.shapes import SHAPES, ModelShape

SCENARIOS = ("balanced", *(f"paper:share={share},experts={n}" for share in (0.3, 0.5, 0.8, 0.95) for n in (16, 4, 1)))


def scenario_counts(scenario: str, shape: ModelShape, ranks: int, tokens: int) -> Index:
    """[R, E] of one step of one layer."""
    one_layer = replace(shape, layer_numbers=(0,))
    (step,) = generate_steps(Workload.parse(scenario), one_layer, num_ranks=ranks, tokens_per_rank=tokens, steps=1)
    counts_RE: Index = step.counts_LRE[0]
    return counts_RE


class Device:
    """Runs and times work on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats = device, repeats

    def median_us(self, work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(self._repeats):
            self._synchronize()
            start_s = time.perf_counter()
            work()
            self._synchronize()
            times.append(1e6 * (time.perf_counter() - start_s))
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rank_us(device: Device, experts: SwigluExperts, rows_NH: torch.Tensor, shares: Shares, rank: int) -> float:
    """Gathering, experts and adding up of all that `rank` computes, its own tokens and others' alike."""
    local_ids = np.arange(shares.plan.placement.num_experts) % len(experts.weights["down"])
    banks = shares.own(rank, 0, local_ids)
    sums_NH = torch.zeros_like(rows_NH)
    index = {
        bank: torch.from_numpy(rows.positions_P % len(rows_NH)).to(device.device)
        for bank, rows in zip(Banks._fields, banks, strict=True)
    }

    def work() -> None:
        for bank, rows in zip(Banks._fields, banks, strict=True):
            if len(rows):
                inputs = rows_NH[index[bank]]
                gates = inputs.new_ones(len(rows))
                output = experts.compute(experts.weights, inputs, rows.experts_G, rows.counts_G, gates)
                sums_NH.index_add_(0, index[bank], output)

    return device.median_us(work)


def host_us(work: Callable[[], object], repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - start_s))
    return statistics.median(times)


def measure(device: Device, shape: ModelShape, ranks: int, tokens: int) -> list[dict[str, Any]]:
    local = shape.num_experts // ranks
    width, inner = shape.hidden_size, shape.intermediate_size
    experts = SwigluExperts(
        torch.randn(local, 2 * inner, width, device=device.device, dtype=torch.bfloat16) / width**0.5,
        torch.randn(local, width, inner, device=device.device, dtype=torch.bfloat16) / inner**0.5,
    )
    rows_NH = torch.randn(tokens, width, device=device.device, dtype=torch.bfloat16)
    room = {name: tensor[:1].clone() for name, tensor in experts.weights.items()}
    lend_us = device.median_us(lambda: [room[name][0].copy_(tensor[0]) for name, tensor in experts.weights.items()])
    placement = Placement.linear(shape.num_experts, ranks, min(4, local))
    found = []
    for scenario in SCENARIOS:
        counts_RE = scenario_counts(scenario, shape, ranks, tokens)
        options = PlanOptions(bytes_per_expert=shape.bytes_per_expert)
        line: dict[str, Any] = {"shape": shape.name, "ranks": ranks, "tokens": tokens, "scenario": scenario}
        for planner in ("home", "quota"):
            plan = plan_step(planner, counts_RE, placement, options)
            shares = Shares.of(plan, counts_RE.sum(axis=0)[None], shape.top_k)
            slowest = int(np.argmax(plan.rank_loads))
            line |= {
                f"{planner}_slowest_rank_us": round(rank_us(device, experts, rows_NH, shares, slowest), 1),
                f"{planner}_plan_us": round(host_us(lambda: plan_step(planner, counts_RE, placement, options)), 1),  # noqa: B023
                f"{planner}_index_us": round(host_us(lambda: _index(plan, counts_RE, shape)), 1),  # noqa: B023
            }
        line |= {"lends": len(plan.lends), "lend_copy_us": round(lend_us, 1)}
        line["compute_speedup"] = round(line["home_slowest_rank_us"] / line["quota_slowest_rank_us"], 3)
        found.append(line)
    return found


def _index(plan: Any, counts_RE: Index, shape: ModelShape) -> None:
    shares = Shares.of(plan, counts_RE, shape.top_k)
    shares.most_rows()
    shares.dispatch(0, 0, np.arange(shape.num_experts) % (shape.num_experts // len(counts_RE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["gpt-oss-120b", "deepseek-v3"], choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/gpu.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no GPU that torch can use here; nothing was measured")
    warm_up()
    device = Device(torch.device("cuda", 0), arguments.repeats)
    for name in arguments.shape:
        for line in measure(device, SHAPES[name], arguments.ranks, arguments.tokens):
            add_record("gpu", {"gpu": torch.cuda.get_device_name(0), **line}, append=arguments.append)


if __name__ == "__main__":
    main()
