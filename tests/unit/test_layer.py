"""The layer on ranks that are threads: every layout and size, equal to one process that holds all experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch

from llep.moe.dispatch import Index
from llep.moe.layer import LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.virtual import VirtualGroup, VirtualTransport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.plan import Plan
from llep.planning import PlanOptions, plan_step
from tests.virtual_layer import assert_equals_one_process

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_replicated", [False, True])
@pytest.mark.parametrize("is_round_robin", [False, True])
@pytest.mark.parametrize(("size", "num_experts"), [(1, 5), (2, 7), (3, 8), (4, 16), (8, 16), (8, 21)])
def test_equals_one_process(size: int, num_experts: int, is_round_robin: bool, is_replicated: bool) -> None:
    """Also where the experts can't be dealt out evenly."""
    lends = assert_equals_one_process(
        CPU, torch.float32, size, num_experts, is_round_robin=is_round_robin, is_replicated=is_replicated
    )
    assert (lends > 0) == (size > 1)


@pytest.mark.parametrize("is_replicated", [False, True])
def test_bfloat16(is_replicated: bool) -> None:
    assert assert_equals_one_process(CPU, torch.bfloat16, 4, 8, is_round_robin=False, is_replicated=is_replicated)


@pytest.mark.parametrize("few_rows", [0, 2, 10, 1000])
def test_own_rows_alone_or_with_those_that_arrive(few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llep.moe.layer.FEW_ROWS", few_rows)
    assert assert_equals_one_process(CPU, torch.float32, 4, 16, is_round_robin=False, is_replicated=False)


@pytest.mark.parametrize(("wire_rows", "chunk_rows"), [(7, 1), (21, 5), (70, 64)])
def test_in_blocks(wire_rows: int, chunk_rows: int) -> None:
    assert assert_equals_one_process(
        CPU, torch.float32, 8, 16, is_round_robin=False, is_replicated=False, room=(chunk_rows, wire_rows)
    )


class Counting:
    """Experts that note the rows of the largest call with each number of weights."""

    def __init__(self, local_experts: int) -> None:
        self.weights = {"w": torch.zeros(local_experts, 1)}
        self.most: dict[int, int] = {}

    def compute(
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        gates_P: object,
    ) -> torch.Tensor:
        assert counts_G.sum() == len(rows_PH)
        self.most[len(bank["w"])] = max(self.most.get(len(bank["w"]), 0), len(rows_PH))
        return rows_PH


def test_no_batch_brings_more_rows_at_a_time_than_the_rehearsed() -> None:
    """A made-up batch, all tokens alike, brings fewer than some later one, when vLLM's workspace is locked."""
    ranks, experts, tokens, top_k = 4, 16, 256, 4
    home = Placement.linear(experts, ranks, 3)
    local_ids = [expert % (experts // ranks) for expert in range(experts)]

    def body(transport: VirtualTransport) -> list[dict[int, int]]:
        counting = Counting(experts // ranks)
        workspace = Workspace.for_batches(tokens, top_k, ranks, CPU, is_replicated=False)
        pool = LendingPool.reserve(counting.weights, 3)
        layer = LeastLoadedMoE(counting, transport, pool, home.home_rank, local_ids, workspace)
        hidden, gates = torch.zeros(tokens, 2), torch.ones(tokens, top_k)
        found = []
        for hot in (1.0, None, 0.9):
            counting.most = {}
            if hot is None:
                layer.rehearse(hidden, [counting.weights, pool.tensors])
            else:
                rng = np.random.default_rng(transport.rank if hot < 1.0 else 0)
                scores = rng.random((tokens if hot < 1.0 else 1, experts)) + np.array([hot] * 4 + [0.0] * 12)
                ids = torch.from_numpy(np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)).expand(tokens, -1)
                layer.forward_sharded(hidden, gates, ids, partial(_lend, home))
            found.append(counting.most)
        return found

    found = VirtualGroup(ranks, CPU).run(body)
    for made_up, rehearsed, real in found:
        for bank in (3, 4):
            assert rehearsed[bank] >= max(made_up.get(bank, 0), real.get(bank, 0))
    assert any(real.get(bank, 0) > made_up.get(bank, 0) for made_up, _, real in found for bank in (3, 4))


def _lend(home: Placement, counts_RE: Index) -> Plan:
    return plan_step("quota", counts_RE, home, PlanOptions(min_chunk_tokens=8))
