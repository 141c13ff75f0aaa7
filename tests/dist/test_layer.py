"""The layer over real gloo processes: equal to one process that holds all experts, whatever the skew and the plan."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llep.config import Mode, Planner, Settings
from llep.moe.agreement import RanksDisagree
from llep.moe.layer import BadBatch, LeastLoadedMoE
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import BLAME_WITHIN_S, PeerLost, Transport
from llep.moe.verify import is_sampled, verify
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.plan import check_plan
from llep.planning.policy import Step, decide
from tests.dist.ranks import start_ranks
from tests.layers import HIDDEN, LARGE, TOP_K, make_layer_on, reference, routed_tokens

RunRanks = Callable[..., list[Any]]


def make_layer(
    rank: int,
    size: int,
    num_experts: int,
    home_rank: tuple[int, ...],
    slots: int,
    workspace: Workspace = LARGE,
    may_read: bool = True,
) -> LeastLoadedMoE:
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=30, may_read=may_read)
    return make_layer_on(transport, home_rank, slots, workspace)


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


def sharded(
    rank: int,
    size: int,
    num_experts: int,
    is_round_robin: bool,
    planner: str,
    steps: int,
    workspace: Workspace = LARGE,
    before_step: Callable[[int], None] = lambda step: None,
) -> Any:
    torch.manual_seed(0)
    linear = Placement.linear(num_experts, size, 2).home_rank
    home_rank = tuple(expert % size for expert in range(num_experts)) if is_round_robin else linear
    layer = make_layer(rank, size, num_experts, home_rank, slots=2, workspace=workspace)
    settings = Settings(planner=Planner(planner), min_chunk_tokens=1, imbalance_threshold=1.05)
    digests: list[tuple[str, int]] = []
    choose = partial(decision, settings, Placement(home_rank, (2,) * size), True, digests)
    worst = 0.0
    for step in range(steps):
        before_step(step)
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
    assert layer.workspace.bytes == (workspace.chunk_rows + 3 * workspace.wire_rows) * HIDDEN * 4
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


@pytest.mark.parametrize(("size", "wire_rows", "chunk_rows"), [(2, 1, 1), (3, 13, 7), (4, 60, 16)])
def test_batches_beyond_the_workspace_are_computed_in_parts(
    run_ranks: RunRanks, size: int, wire_rows: int, chunk_rows: int
) -> None:
    results = run_ranks(sharded, size, 8, False, "quota", 8, Workspace(chunk_rows, wire_rows))
    assert max(worst for worst, _ in results) < 1e-5
    assert all(digests == results[0][1] for _, digests in results)


def fanned_out(rank: int, size: int, may_read: bool) -> tuple[float, int]:
    """One expert gets everything, so that every rank borrows it, over gloo by the plan's relay tree."""
    home_rank = Placement.linear(size, size, 2).home_rank
    layer = make_layer(rank, size, size, home_rank, slots=1, may_read=may_read)
    settings = Settings(min_chunk_tokens=1, imbalance_threshold=1.05)
    rounds, worst = 0, 0.0
    for step in range(3):
        hidden, gates, _ = routed_tokens(np.random.default_rng([step, rank]), 80, size, [0], 1.0)
        ids = torch.full((80, TOP_K), step, dtype=torch.int32)
        result = layer.forward_sharded(
            hidden, gates, ids, partial(decision, settings, Placement(home_rank, (1,) * size), True, [])
        )
        rounds = max(rounds, *(hop.round for hop in result.plan.transfers))
        expected = reference(hidden, gates, ids, size)
        worst = max(worst, float((result.output_TH - expected).abs().max() / expected.abs().max()))
    return worst, rounds


@pytest.mark.parametrize("may_read", [False, True])
def test_weights_fan_out_to_many_ranks(run_ranks: RunRanks, may_read: bool) -> None:
    results = run_ranks(fanned_out, 6, may_read)
    assert max(worst for worst, _ in results) < 1e-5
    assert all(rounds >= 2 for _, rounds in results), "the plan has nobody pass weights on"


BAD_BATCHES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "hidden_TH has 4 tokens": lambda hidden, gates, ids: (hidden[:4], gates, ids),
    "gates_TK has shape": lambda hidden, gates, ids: (hidden, gates[:, :1], ids),
    "ids_TK has shape (10,)": lambda hidden, gates, ids: (hidden, gates, ids.reshape(-1)),
    "ids_TK is torch.float32": lambda hidden, gates, ids: (hidden, gates, ids.float()),
    "hidden_TH is torch.int64": lambda hidden, gates, ids: (hidden.long(), gates, ids),
    "2 ids are outside 0..5": lambda hidden, gates, ids: (hidden, gates, ids + 6 * (torch.arange(5) == 0)[:, None]),
    "1 ids are outside": lambda hidden, gates, ids: (hidden, gates, ids - (torch.arange(10) == 3).view(5, 2) * 99),
    "hidden_TH is on meta": lambda hidden, gates, ids: (hidden.to("meta"), gates, ids),
    "different forms": lambda hidden, gates, ids: (hidden, gates[:, :1], ids[:, :1]),
}


def refused(rank: int, size: int, is_replicated: bool) -> list[str]:
    """The last rank is given one bad batch after the other; what each rank said. A good one follows each."""
    home_rank = Placement.linear(6, size, 2).home_rank
    layer = make_layer(rank, size, 6, home_rank, slots=2)
    choose = partial(decision, Settings(min_chunk_tokens=1), Placement(home_rank, (2,) * size), True, [])
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [1, 3], [3, 2]])
    batch = torch.ones(5, HIDDEN), torch.ones(5, TOP_K), ids
    said = []
    for problem, spoil in BAD_BATCHES.items():
        if is_replicated and "forms" in problem:
            continue
        given = spoil(*batch) if rank == size - 1 else batch
        for tensors in (given, batch):
            try:
                if is_replicated:
                    layer.forward_replicated(*tensors, choose, agree=True)  # type: ignore[misc]
                else:
                    layer.forward_sharded(*tensors, choose)  # type: ignore[misc]
            except BadBatch as error:
                assert tensors is not batch or rank < size - 1, error
                said.append(error.message)
                assert "EP rank" in error.message or problem in error.message, (problem, error.message)
    return said


@pytest.mark.parametrize("is_replicated", [False, True])
def test_a_bad_batch_is_refused_by_all_ranks_and_leaves_no_trace(run_ranks: RunRanks, is_replicated: bool) -> None:
    results = run_ranks(refused, 3, is_replicated)
    assert [len(said) for said in results] == [len(BAD_BATCHES) - is_replicated] * 3
    assert results[0][0] == "EP rank 2 refused its batch; see its log. Nobody computes this layer"


@pytest.mark.parametrize(("size", "is_disagreeing"), [(2, False), (2, True), (3, True)])
def test_replicated_tokens_give_what_one_process_gives(run_ranks: RunRanks, size: int, is_disagreeing: bool) -> None:
    """Also when the ranks' routers disagree: rank 0's choice holds on all of them, and nobody hangs."""
    results = run_ranks(replicated, size, 7, "least_loaded", is_disagreeing)
    assert max(worst for worst, _ in results) < 1e-5
    assert all(digests == results[0][1] for _, digests in results)
    assert any(name == "lend" for name, _ in results[0][1])


class Corrupted(SwigluExperts):
    """Whatever is computed with borrowed weights comes out a little wrong on the last rank."""

    def compute(self, bank: Any, *arguments: Any) -> torch.Tensor:
        output = super().compute(bank, *arguments)
        return output if bank is self.weights else output * 1.01


def verified(rank: int, size: int, is_replicated: bool, is_corrupt: bool) -> tuple[float, bool, float]:
    home_rank = Placement.linear(8, size, 2).home_rank
    layer = make_layer(rank, size, 8, home_rank, slots=2)
    if is_corrupt and rank == size - 1:
        layer.experts = Corrupted(*layer.experts.weights.values())
    choose = partial(decision, Settings(min_chunk_tokens=1), Placement(home_rank, (2,) * size), True, [])
    batch = routed_tokens(np.random.default_rng(0 if is_replicated else rank), 50, 8, [0, 1], 1.0)
    if is_replicated:
        result = layer.forward_replicated(*batch, choose, agree=True)
    else:
        result = layer.forward_sharded(*batch, choose)
    assert result.plan.lends
    found = verify(layer, result, *batch, is_replicated=is_replicated)
    output = found.plain.output_TH
    if is_replicated:
        layer.transport.add_up(output, "outputs")
    expected = reference(*batch, 8)
    return found.difference, found.is_equal, float((output - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("is_replicated", "is_corrupt"), [(r, c) for r in (False, True) for c in (False, True)])
def test_a_sampled_step_is_compared_with_plain_ep(run_ranks: RunRanks, is_replicated: bool, is_corrupt: bool) -> None:
    for difference, is_equal, error in run_ranks(verified, 2, is_replicated, is_corrupt):
        assert is_equal is not is_corrupt
        assert (difference > 1e-3) if is_corrupt else (difference < 1e-5)
        assert error < 1e-5


def test_as_many_steps_are_sampled_as_the_ratio_says() -> None:
    for ratio in (0.0, 0.01, 0.3, 1.0):
        assert abs(sum(is_sampled(step, ratio) for step in range(1000)) - 1000 * ratio) <= 1


def hurt(rank: int, size: int, where: str, fault: str, calls: int = 3, may_read: bool = True) -> str:
    """The last rank dies or stalls once it has come to `where` so many times; what another rank said."""
    home_rank = Placement.linear(8, size, 2).home_rank
    layer = make_layer(rank, size, 8, home_rank, slots=2, may_read=may_read)
    layer.transport.watchdog_s = 3
    counter = itertools.count()
    if rank == size - 1:
        healthy = getattr(layer.transport, where)

        def broken(*arguments: Any, **named: Any) -> Any:
            if next(counter) == calls:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(25)
                return "stalled"
            return healthy(*arguments, **named)

        setattr(layer.transport, where, broken)
    choose = partial(decision, Settings(min_chunk_tokens=1), Placement(home_rank, (2,) * size), True, [])
    for step in range(20):
        layer.transport.where = f"step {step}, layer 0"
        start_s = time.monotonic()
        try:
            layer.forward_sharded(*routed_tokens(np.random.default_rng([step, rank]), 50, 8, [0, 1], 1.0), choose)
        except PeerLost as error:
            assert time.monotonic() - start_s < 3 + BLAME_WITHIN_S + 4
            return error.message
    return "went on"


@pytest.mark.parametrize(
    ("where", "may_read"), [("gather", True), ("start_lends", True), ("start_lends", False), ("exchange", True)]
)
@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_a_rank_that_dies_or_stalls_ends_the_others_and_is_named(where: str, may_read: bool, fault: str) -> None:
    said = start_ranks(hurt, 3, where, fault, 3, may_read, lost=(2,))
    for rank, message in enumerate(said[:2]):
        assert f"EP rank {rank} of 3 gave up at step" in message and "layer 0, in " in message
        assert "EP rank 2 stopped or stalled" in message, message


def misled(
    rank: int, size: int, step_of_fault: int, is_replicated: bool, compare: bool = True, fault: str = "counts"
) -> str:
    """What each rank said. The last one's memory holds other counts than were gathered, as if a bit had flipped, other
    by a token, or other settings."""
    home_rank = Placement.linear(8, size, 2).home_rank
    layer = make_layer(rank, size, 8, home_rank, slots=2)
    layer.transport.watchdog_s = 3
    settings = Settings(min_chunk_tokens=1, imbalance_threshold=1.05)
    choose = partial(decision, settings, Placement(home_rank, (2,) * size), False, [])
    for step in range(step_of_fault + 4):
        layer.transport.where = f"step {step}, layer 0"
        shared = np.random.default_rng([step, 0 if is_replicated else rank])
        batch = routed_tokens(shared, 50, 8, [0, 1], 0.8)

        def wrong(counts: Any, is_wrong: bool = rank == size - 1 and step == step_of_fault) -> Any:
            moved, tokens = counts.copy(), 1 if fault == "token" else counts[0, 0] - counts[0, 0] // 4
            moved[0, 0], moved[0, 5] = moved[0, 0] - tokens, moved[0, 5] + tokens
            return choose(moved if is_wrong and fault != "settings" else counts)

        if fault == "settings" and rank == size - 1:
            layer.transport.settings_digest = step // step_of_fault
        try:
            if is_replicated:
                result = layer.forward_replicated(*batch, wrong, agree=True, compare=compare)
            else:
                result = layer.forward_sharded(*batch, wrong, compare=compare)
            verify(layer, result, *batch, is_replicated=is_replicated)
        except (PeerLost, RanksDisagree) as error:
            return f"{error.code}: {error.message}"
    return "went on"


@pytest.mark.parametrize(("is_replicated", "compare"), [(False, True), (True, True), (True, False)])
def test_a_rank_with_other_counts_ends_all_and_is_named(is_replicated: bool, compare: bool) -> None:
    """At once where plans are compared, else when lends are waited for that nobody sends."""
    for rank, message in enumerate(start_ranks(misled, 3, 2, is_replicated, compare)):
        assert message.startswith("ranks_disagree" if compare else "peer_lost"), message
        assert "step 2, layer 0" in message and "EP rank 2 holds other" in message, (rank, message)


def test_a_plan_that_was_other_by_a_token_is_found_with_the_next_counts() -> None:
    """All lends were there, so that nobody waited: no exchange but that of counts tells."""
    for message in start_ranks(misled, 3, 2, True, False, "token"):
        assert message.startswith("ranks_disagree"), message
        assert "EP rank 2 holds other plans than the others at step 2, layer 0" in message


@pytest.mark.parametrize("is_replicated", [True, False])
def test_a_rank_with_other_settings_ends_all_and_is_named(is_replicated: bool) -> None:
    for message in start_ranks(misled, 3, 2, is_replicated, False, "settings"):
        assert message.startswith("ranks_disagree"), message
        assert "EP rank 2 runs other settings than the others at step 2, layer 0" in message


def lonely(rank: int, size: int) -> str:
    """Rank 1 never enters the layer; rank 0 must give up by itself."""
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
    assert "EP rank 0 of 2 gave up at one layer, in exchange of counts" in message and "watchdog_s=2" in message
    assert "EP rank 1 stopped or stalled" in message


def test_mode_names_are_the_documented_ones() -> None:
    assert [mode.value for mode in Mode] == ["off", "observe", "shadow", "active"]
