"""What the layer allocates at most, under any skew, beside what it has reserved: counted by torch's own allocator.

Each scenario runs in processes of its own: the pool and the workspace are reserved, then a batch is computed under
torch's profiler, which counts each allocation. The bytes of a run are the same on every machine and in every repeat.
peak: the most of a rank, of its activations, for which the batch itself and the weights don't count, with the workspace
but without the pool. Prints, and with --append keeps, one JSON line a scenario.

    python -m bench.memory [--ranks 2] [--append]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.layer import Case, choose_experts, make_layer, settings_of
from bench.record import add_record
from llep.moe.transport import Transport
from llep.placement import Placement
from llep.planning.policy import Step, decide
from tests.dist.ranks import start_ranks

BASE = Case()
CASES = [BASE, *(replace(BASE, share=share, hot=hot) for share in (0.3, 0.8, 0.95, 1.0) for hot in (16, 4, 1))]


def most_allocated(profiled: profile) -> int:
    """The most bytes that were allocated at once within the profile, beyond those at its start."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(rank: int, size: int, case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    layer = make_layer(case, Transport(range(size), torch.device("cpu")))
    placement = Placement(layer.home_rank, (layer.pool.slots,) * size)
    hidden_TH = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(rank))
    gates_TK = torch.full((case.tokens, case.top_k), 1 / case.top_k)
    ids_TK = choose_experts(case, rank, is_balanced=not case.hot)
    prefill = Step("prefill", size * case.tokens)
    found: dict[str, Any] = {}
    for way in ("plain", "llep"):
        settings = settings_of(case, way)
        for is_measured in (False, True):  # the first makes the workspace
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                result = layer.forward_sharded(
                    hidden_TH,
                    gates_TK,
                    ids_TK,
                    lambda counts: decide(settings, prefill, 0, counts, placement, 1 << 20),  # noqa: B023
                )
            if is_measured:
                found[f"{way}_peak_bytes"] = most_allocated(profiled) + layer.workspace.bytes
                found[f"{way}_lends"] = len(result.plan.lends)
    return {**found, "pool_bytes": layer.pool.bytes, "workspace_bytes": layer.workspace.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--append", action="store_true", help="keep the lines in bench/results/memory.jsonl")
    arguments = parser.parse_args()
    balanced = 0
    for case in CASES:
        ranks = start_ranks(measure, arguments.ranks, case, timeout_s=600)
        found = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        balanced = balanced or found["plain_peak_bytes"]
        ratio = {f"{way}_of_balanced": round(found[f"{way}_peak_bytes"] / balanced, 3) for way in ("plain", "llep")}
        record = {"ranks": arguments.ranks, **asdict(case), **found, **ratio}
        add_record("memory", record, append=arguments.append)


if __name__ == "__main__":
    main()
