"""Weights of any type and layout travel between real processes byte for byte, also by way of other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llep.errors import LlepError, UnsupportedConfiguration
from llep.moe import neighbours
from llep.moe.layer import BadWeights, LeastLoadedMoE
from llep.moe.slots import Copy, LendingPool, bytes_of_expert, bytes_per_expert, is_lendable, span
from llep.moe.swiglu import SwigluExperts
from llep.moe.transport import Transport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.plan import Decision, Plan, Segment
from tests.layers import LARGE, make_layer_on

RunRanks = Callable[..., list[Any]]
Layouts = dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]  # of one expert's tensors

LAYOUTS: dict[str, Layouts] = {
    "float32": {"w13_weight": (torch.float32, (24, 16), (16, 1)), "w2_weight": (torch.float32, (16, 12), (12, 1))},
    "bfloat16, biases": {
        "w13_weight": (torch.bfloat16, (24, 16), (16, 1)),
        "w2_weight": (torch.bfloat16, (16, 12), (12, 1)),
        "w13_bias": (torch.bfloat16, (24,), (1,)),
        "w2_bias": (torch.bfloat16, (16,), (1,)),
    },
    "a scale per expert": {"w": (torch.float8_e4m3fn, (3, 5), (5, 1)), "scale": (torch.float32, (), ())},
    "scales as powers of two": {"w": (torch.int32, (4, 6), (6, 1)), "scale": (torch.float8_e8m0fnu, (2, 6), (6, 1))},
    "transposed scales": {"w": (torch.float8_e4m3fn, (8, 6), (6, 1)), "scale": (torch.float32, (4, 3), (1, 4))},
    "padded rows": {"w": (torch.float8_e4m3fn, (4, 6), (8, 1)), "zero point": (torch.uint16, (5,), (1,))},
}


def random_weights(layouts: Layouts, experts: int, seed: int) -> dict[str, torch.Tensor]:
    """Random bytes in the layout: not a number, infinite, whatever a type has."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (dtype, shape, strides) in layouts.items():
        values = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        apart = values + 3 if name == "padded" else values
        memory = torch.from_numpy(rng.integers(0, 256, experts * apart * dtype.itemsize, dtype=np.uint8))
        weights[name] = memory.view(dtype).as_strided((experts, *shape), (apart, *strides))
    return weights


def lent_bytes(rank: int, size: int, layouts: dict[str, Layouts], halves: int, way: str) -> int:
    """Every rank lends its second expert to all others, first by way of other ranks; how many lends were compared.

    way: reading, gloo, or batched: as over NCCL, which is not to be had here, but without the order that its stream
    keeps.
    """
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=60, may_read=way == "reading")
    assert transport.lends_by == ("reading" if way == "reading" else "gloo")
    if way == "batched":
        transport._start_each = transport._start_batches  # type: ignore[method-assign]
    home_rank, local_ids = tuple(e // 2 for e in range(2 * size)), tuple(e % 2 for e in range(2 * size))
    placement = Placement(home_rank, (size,) * size)
    compared = 0
    for case in layouts.values():
        all_weights = [random_weights(case, 2, seed) for seed in range(size)]
        pool = LendingPool.reserve(all_weights[rank], 2, halves=halves)
        for layer, expert in enumerate(range(1, 2 * size, 2)):
            plan = Plan(Decision.LEND, placement, [Segment(expert, to, to, to + 1) for to in range(size)])
            half = pool.half(layer)
            before = [bytes_of_expert(tensor, 0).clone() for tensor in pool.half(layer + 1).tensors.values()]
            transport.start_lends(plan, all_weights[rank], local_ids, half.tensors).wait()
            if home_rank[expert] == rank:
                continue
            for name, tensor in all_weights[home_rank[expert]].items():
                assert torch.equal(bytes_of_expert(half.tensors[name], 0), bytes_of_expert(tensor, 1)), (case, name)
                lent, owned = half.tensors[name][0], tensor[1]
                assert lent.stride() == owned.stride() and lent.dtype == owned.dtype
            if halves > 1:
                after = [bytes_of_expert(tensor, 0) for tensor in pool.half(layer + 1).tensors.values()]
                assert all(map(torch.equal, before, after)), "the other half was written to"
            compared += 1
    return compared


@pytest.mark.parametrize(
    ("size", "halves", "way"),
    [(2, 1, "gloo"), (6, 2, "gloo"), (3, 2, "batched"), (2, 1, "reading"), (6, 2, "reading")],
)
def test_lends_arrive_byte_for_byte(run_ranks: RunRanks, size: int, halves: int, way: str) -> None:
    """Six ranks over gloo: from four receivers on, weights are passed on."""
    assert run_ranks(lent_bytes, size, LAYOUTS, halves, way) == [len(LAYOUTS) * (size - 1)] * size


def read_late(rank: int, size: int) -> tuple[str, bool]:
    """Rank 0 lends to rank 1, which comes to reading late, and changes its weights as soon as its wait is over.

    (how the ranks lend, whether rank 1 has what was lent).
    """
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=30)
    weights, room = {"w": torch.ones(2, 1000)}, {"w": torch.zeros(1, 1000)}
    if rank == 1:
        read = neighbours.read

        def late(pid: int, address: int, into: torch.Tensor) -> None:
            time.sleep(1.0)
            read(pid, address, into)

        neighbours.read = late
    transport.start_copies([Copy(0, 0, 0, 1, 0)], weights, [1], room).wait()
    weights["w"].fill_(5)
    return transport.lends_by, bool((room["w"] == rank).all())


def test_who_lends_by_memory_waits_until_it_is_read(run_ranks: RunRanks) -> None:
    assert run_ranks(read_late, 2) == [("reading", True)] * 2


def lends_by(rank: int, size: int) -> str:
    return Transport(range(size), torch.device("cpu"), may_read=rank != 1).lends_by


def test_nobody_reads_memory_where_one_rank_may_not(run_ranks: RunRanks) -> None:
    assert run_ranks(lends_by, 3) == ["gloo"] * 3


def misfit(rank: int, size: int) -> str:
    """What a rank says that has room for another number of bytes than it is offered."""
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=2)
    try:
        transport.start_copies([Copy(0, 0, 0, 1, 0)], {"w": torch.ones(1, 8)}, [0], {"w": torch.zeros(1, 9)}).wait()
    except LlepError as error:
        return f"{error.code}: {error.message}"
    return ""


def test_weights_of_another_size_are_not_read(run_ranks: RunRanks) -> None:
    lender, borrower = run_ranks(misfit, 2)
    assert borrower.startswith("ranks_disagree: EP rank 0 lends w of expert 0 as 32 bytes, EP rank 1 has room for 36")
    assert lender.startswith("peer_lost"), "a lender that is told nothing gives up"


def test_a_pool_has_the_layout_of_the_weights_and_halves_count() -> None:
    for layouts in LAYOUTS.values():
        weights = random_weights(layouts, 3, 0)
        assert all(map(is_lendable, weights.values()))
        pool = LendingPool.reserve(weights, 2, halves=2)
        assert pool.bytes == 4 * bytes_per_expert(weights)
        first, second, third = (pool.half(layer).tensors for layer in range(3))
        for name, tensor in weights.items():
            assert first[name].shape == (2, *tensor.shape[1:]) and first[name].stride()[1:] == tensor.stride()[1:]
            assert first[name].data_ptr() == third[name].data_ptr() != second[name].data_ptr()
            assert span(first[name]) == span(tensor)
    with pytest.raises(UnsupportedConfiguration, match="less than one slot of"):
        LendingPool.reserve(weights, 2, budget_bytes=2 * bytes_per_expert(weights) - 1, halves=2)


def interleaved(weights: torch.Tensor) -> torch.Tensor:
    return weights.transpose(0, 2).contiguous().transpose(0, 2)


BAD_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "weights['gate_up'] has shape (2, 96, 32) and strides (1, 2, 192): each expert must be a stretch": interleaved,
    "does not fit the pool's": lambda weights: weights.double(),
    "is on meta: the EP group is on cpu": lambda weights: weights.to("meta"),
    "have different first dimensions": lambda weights: weights[:1],
}


def refuse_weights(rank: int, size: int) -> list[str]:
    """The last rank brings bad weights; what each rank said."""
    transport = Transport(range(size), torch.device("cpu"), watchdog_s=30)
    good = make_layer_on(transport, (0, 0, 1, 1, 2, 2), 1, LARGE)
    said = []

    def try_layer(weights: torch.Tensor, home_rank: tuple[int, ...], local_ids: tuple[int, ...]) -> None:
        experts = SwigluExperts(weights, good.experts.weights["down"])
        try:
            LeastLoadedMoE(experts, transport, good.pool, home_rank, local_ids, Workspace(8, 8))
        except BadWeights as error:
            said.append(error.message)

    weights, is_last = good.experts.weights["gate_up"], rank == size - 1
    for spoil in BAD_WEIGHTS.values():
        try_layer(spoil(weights) if is_last else weights, good.home_rank, good.local_ids)
    try_layer(weights, (0, 0, 1, 1, 2, 2), (0, 1, 0, 1, 0, 2 if is_last else 1))
    try_layer(weights, (0, 0, 1, 1, 2, 2), (1, 0, 0, 1, 0, 1) if is_last else good.local_ids)
    try_layer(weights, good.home_rank, good.local_ids)
    return said


def test_bad_weights_are_refused_by_all_ranks(run_ranks: RunRanks) -> None:
    *others, last = run_ranks(refuse_weights, 3)
    for problem, message in zip(BAD_WEIGHTS, last, strict=False):
        assert problem in message, message
    assert "local_ids of this rank's experts are [0, 2]" in last[4]
    assert "all EP ranks must have the same homes of experts: rank 2 has others than rank 0" in last[5]
    assert len(last) == 6
    for said in others:
        assert said == ["EP rank 2 refused its weights; see its log. Nobody has a layer"] * 5 + [last[5]]
