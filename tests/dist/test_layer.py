"""The layer over real gloo processes: equal to one process that holds all experts, whatever the skew and the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llep.config import Mode, Planner, Settings
from llep.moe.layer import LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import Transport
from llep.placement import Placement
from llep.plan import check_plan
from llep.planning.policy import Step, decide

HIDDEN, INTERMEDIATE, TOP_K = 32, 48, 2
RunRanks = Callable[..., list[Any]]


def all_weights(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    gate_up = torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(num_experts, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    return gate_up, down


def routed_tokens(
    rng: np.random.Generator, tokens: int, num_experts: int, hot_experts: list[int], hot_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], gates [T, K], distinct expert ids [T, K], of which hot_share favour hot_experts."""
    scores = rng.random((tokens, num_experts))
    scores[:, hot_experts] += rng.random((tokens, 1)) < hot_share
    ids = torch.from_numpy(np.argsort(-scores, axis=1)[:, :TOP_K].copy()).to(torch.int32)
    gates = torch.from_numpy(rng.random((tokens, TOP_K), dtype=np.float32))
    return torch.from_numpy(rng.standard_normal((tokens, HIDDEN), dtype=np.float32)), gates, ids


def reference(hidden: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    experts = SwigluExperts(*all_weights(num_experts))
    output = torch.zeros_like(hidden)
    for k in range(ids.shape[1]):
        output += experts.compute(experts.weights, hidden, ids[:, k].long(), gates[:, k])
    return output


def make_layer(rank: int, size: int, num_experts: int, home_rank: tuple[int, ...], slots: int) -> LeastLoadedMoE:
    mine = [expert for expert in range(num_experts) if home_rank[expert] == rank]
    gate_up, down = all_weights(num_experts)
    experts = SwigluExperts(gate_up[mine].clone(), down[mine].clone())
    pool = LendingPool.reserve(experts.weights, slots)
    local_ids = [sum(home_rank[other] == home_rank[expert] for other in range(expert)) for expert in range(num_experts)]
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=30)
    return LeastLoadedMoE(experts, transport, pool, home_rank, local_ids)


def tokens_in_step(rng: np.random.Generator, rank: int, step: int) -> int:
    """Ragged sources; every third step a rank has none, and once nobody has."""
    sizes = [int(n) for n in rng.integers(0, 60, size=8)]
    return 0 if step == 5 or (step % 3 == 0 and rank == step % 2) else sizes[rank]


def decision(
    settings: Settings, placement: Placement, is_checked: bool, digests: list[tuple[str, int]], counts: Any
) -> Any:
    counts_RE = np.zeros((placement.ep_size, placement.num_experts), np.int64)
    counts_RE[: len(counts)] = counts
    plan = decide(settings, Step("prefill", 10_000), 0, counts_RE, placement, 4096)
    if is_checked:
        check_plan(plan, counts_RE.sum(axis=0).tolist())
    digests.append((plan.decision.value, plan.digest()))
    return plan


def sharded(rank: int, size: int, num_experts: int, is_round_robin: bool, planner: str, steps: int) -> Any:
    torch.manual_seed(0)
    linear = Placement.linear(num_experts, size, 2).home_rank
    home_rank = tuple(expert % size for expert in range(num_experts)) if is_round_robin else linear
    layer = make_layer(rank, size, num_experts, home_rank, slots=2)
    settings = Settings(planner=Planner(planner), min_chunk_tokens=1, imbalance_threshold=1.05)
    digests: list[tuple[str, int]] = []
    choose = partial(decision, settings, Placement(home_rank, (2,) * size), True, digests)
    worst = 0.0
    for step in range(steps):
        shared = np.random.default_rng(step)
        share = float(shared.random())
        hot = [int(e) for e in shared.choice(num_experts, size=2, replace=False)]
        tokens = tokens_in_step(shared, rank, step)
        hidden, gates, ids = routed_tokens(np.random.default_rng([step, rank]), tokens, num_experts, hot, share)
        result = layer.forward_sharded(hidden, gates, ids, choose)
        expected = reference(hidden, gates, ids, num_experts)
        assert result.output_TH.shape == expected.shape
        if tokens:
            worst = max(worst, float((result.output_TH - expected).abs().max() / expected.abs().max()))
    return worst, digests


def replicated(rank: int, size: int, num_experts: int, planner: str, is_disagreeing: bool) -> Any:
    import torch.distributed as dist

    home_rank = Placement.linear(num_experts, size, 2).home_rank
    layer = make_layer(rank, size, num_experts, home_rank, slots=2)
    settings = Settings(planner=Planner(planner), min_chunk_tokens=1, imbalance_threshold=1.05)
    digests: list[tuple[str, int]] = []
    choose = partial(decision, settings, Placement(home_rank, (2,) * size), True, digests)
    worst = 0.0
    for step, (hot, share, tokens) in enumerate([([0], 1.0, 64), ([0, 1], 0.5, 33), ([2], 0.0, 7), ([0], 1.0, 0)]):
        hidden, gates, ids = routed_tokens(np.random.default_rng(step), tokens, num_experts, hot, share)
        expected = reference(hidden, gates, ids, num_experts)
        if is_disagreeing and rank == size - 1 and tokens:
            ids = ids.clone()
            ids[0] = ids[0].roll(1)  # this rank's router saw the same experts in another order
            ids[-1, 0] = next(e for e in range(num_experts) if e not in ids[-1])  # and one other expert
        output = layer.forward_replicated(hidden, gates, ids, choose, agree=True).output_TH
        dist.all_reduce(output)
        if tokens:
            worst = max(worst, float((output - expected).abs().max() / expected.abs().max()))
    return worst, digests


@pytest.mark.parametrize(
    ("size", "planner"),
    [
        (2, "home"),
        (1, "least_loaded"),
        (2, "least_loaded"),
        (3, "least_loaded"),
        (2, "quota"),
        (3, "quota"),
        (4, "quota"),
    ],
)
def test_sharded_tokens_give_what_one_process_gives(run_ranks: RunRanks, size: int, planner: str) -> None:
    results = run_ranks(sharded, size, 8, size == 3, planner, 24)
    assert max(worst for worst, _ in results) < 1e-5
    assert all(digests == results[0][1] for _, digests in results), "ranks planned differently"
    if planner != "home" and size > 1:
        assert any(name == "lend" for name, _ in results[0][1]), "the test lent nothing"


@pytest.mark.parametrize(("size", "is_disagreeing"), [(2, False), (2, True), (3, True)])
def test_replicated_tokens_give_what_one_process_gives(run_ranks: RunRanks, size: int, is_disagreeing: bool) -> None:
    """Also when the ranks' routers disagree: rank 0's choice holds on all of them, and nobody hangs."""
    results = run_ranks(replicated, size, 7, "least_loaded", is_disagreeing)
    assert max(worst for worst, _ in results) < 1e-5
    assert all(digests == results[0][1] for _, digests in results)
    assert any(name == "lend" for name, _ in results[0][1])


def lonely(rank: int, size: int) -> str:
    """Rank 1 never enters the layer; rank 0 must give up by itself."""
    import time

    from llep.moe.transport import PeerLost

    transport = Transport(range(size), torch.device("cpu"), watchdog_s=2)
    if rank == 1:
        time.sleep(8)
        return ""
    try:
        transport.gather(torch.zeros(3, dtype=torch.int64), "exchange of counts")
    except PeerLost as error:
        return error.message
    return "went on alone"


def test_a_rank_that_stays_away_ends_the_others(run_ranks: RunRanks) -> None:
    message = run_ranks(lonely, 2)[0]
    assert "EP rank 0 of 2 gave up in exchange of counts" in message and "watchdog_s=2" in message


def test_mode_names_are_the_documented_ones() -> None:
    assert [mode.value for mode in Mode] == ["off", "observe", "shadow", "active"]
