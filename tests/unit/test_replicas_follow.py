"""Resident replicas on ranks that are threads: filled, switched on, dropped together, and never seen in an output."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llep.messages import PlacementOrder
from llep.moe.replicas import BadPlacement, Replicas, Room
from llep.moe.virtual import VirtualGroup, VirtualTransport
from llep.placement import Placement
from tests.following import EXPERTS, LAYERS, ROOM, assert_followed, follow_changes
from tests.layers import LARGE, make_layer_on

CPU = torch.device("cpu")
torch.set_num_threads(1)


@pytest.mark.parametrize("is_replicated", [False, True])
def test_outputs_are_the_same_whatever_is_told(is_replicated: bool) -> None:
    body = partial(follow_changes, changes=20, seed=4, is_replicated=is_replicated)
    assert_followed(VirtualGroup(4, CPU).run(body))


def replicas_on(transport: VirtualTransport, layers: int = LAYERS, rows: int = ROOM) -> Replicas:
    replicas = Replicas(transport)
    home = Placement.linear(EXPERTS, transport.size, 2)
    room: Room | None = None
    for layer in range(layers):
        moe = make_layer_on(transport, home.home_rank, 2, LARGE, seed=layer)
        room = room or Room.reserve(moe.experts.weights, rows)
        replicas.add_layer(moe, home, room)
    return replicas


ORDER = PlacementOrder(5, ((0, 0, 1), (0, 1, 1), (2, 0, 1), (2, 7, 0)), bytes_per_s=1)


@pytest.mark.parametrize(
    ("replicas", "reason"),
    [
        (((3, 0, 1),), "placement 5: unknown layer: place 3 of 3 layers"),
        (((-1, 0, 1),), "unknown layer"),
        (((1, 12, 1),), "placement 5, layer place 1: unknown expert 12 of 12"),
        (((1, 0, 2),), "placement 5, layer place 1: unknown rank 2 of 2"),
        (((1, 0, 0),), "a copy at home: expert 0 lives on rank 0"),
        (((0, 0, 1), (0, 0, 1)), "placement 5: doubles: layer place 0, expert 0 on rank 1"),
        (tuple((0, e, 1) for e in range(ROOM + 1)), "more copies than room: rank 1 has room for 4"),
    ],
)
def test_what_cannot_be_followed_is_refused(replicas: tuple[tuple[int, int, int], ...], reason: str) -> None:
    def body(transport: VirtualTransport) -> None:
        with pytest.raises(BadPlacement, match=reason):
            replicas_on(transport).check(PlacementOrder(5, replicas, 1 << 20))

    VirtualGroup(2, CPU).run(body)


def test_what_no_rate_can_fill_is_refused() -> None:
    with pytest.raises(BadPlacement, match="bytes_per_s=0 must be at least 1"):
        VirtualGroup(1, CPU).run(lambda transport: replicas_on(transport).check(PlacementOrder(5, (), 0)))


def test_no_more_bytes_than_the_order_allows_a_layer_at_a_time() -> None:
    def body(transport: VirtualTransport) -> list[int]:
        replicas = replicas_on(transport)
        per_copy = replicas.layers[0].bytes_per_expert
        order = PlacementOrder(5, ORDER.replicas, bytes_per_s=4 * per_copy)
        filled = []
        for quarter in range(8):  # four steps a second, a copy a step
            replicas.follow(order, 100 + quarter / 4, [0, 0], may_fill=quarter != 2)
            filled.append(replicas.filled)
            assert (replicas.live_number == 5) == (replicas.filled == 4)
            assert bool(replicas.layers[0].placement.replicas) == (replicas.filled == 4)
        return filled

    filled, _ = VirtualGroup(2, CPU).run(body)
    assert filled == [0, 1, 1, 2, 3, 4, 4, 4]


def test_a_slow_engine_is_not_flooded_after_a_pause() -> None:
    def body(transport: VirtualTransport) -> list[int]:
        replicas = replicas_on(transport)
        order = PlacementOrder(5, ORDER.replicas, bytes_per_s=replicas.layers[0].bytes_per_expert)
        for clock_s in (1000, 2000, 3000):
            replicas.follow(order, clock_s, [0, 0], may_fill=True)
        return [replicas.filled]

    assert VirtualGroup(2, CPU).run(body) == [[2], [2]]


def test_what_stays_acts_on_while_the_rest_is_filled_and_dropping_is_at_once() -> None:
    def body(transport: VirtualTransport) -> None:
        replicas = replicas_on(transport)
        fast = 1 << 30
        first = PlacementOrder(5, ((0, 0, 1), (1, 1, 1)), fast)
        for step in range(4):
            replicas.follow(first, step, [0, 0], may_fill=True)
        assert (replicas.live_number, replicas.filled) == (5, 2)
        kept = replicas.layers[0].placement
        second = PlacementOrder(6, ((0, 0, 1), (2, 2, 1)), fast)
        replicas.follow(second, 4, [0, 0], may_fill=False)
        assert (replicas.live_number, replicas.filled) == (5, 1)
        assert replicas.layers[0].placement is kept and not replicas.layers[1].placement.replicas
        replicas.follow(second, 5, [0, 0], may_fill=True)
        assert replicas.live_number == 6 and replicas.layers[2].placement.replicas == ((2, 1),)
        replicas.follow(None, 6, [0, 0], may_fill=True)
        assert (replicas.live_number, replicas.filled, replicas.used_bytes) == (0, 0, 0)
        assert all(placed.placement == placed.home for placed in replicas.layers)
        assert all(not placed.moe.residents.row_of for placed in replicas.layers)

    VirtualGroup(2, CPU).run(body)


def test_weights_loaded_anew_on_any_rank_are_copied_anew_whatever_the_ranks_count() -> None:
    """A rank that loads later has them dropped once more; vLLM's loader makes other numbers of calls on each."""

    def body(transport: VirtualTransport) -> None:
        replicas = replicas_on(transport)
        order = PlacementOrder(5, ORDER.replicas, 1 << 30)
        for start, weights_R in ((0, [0, 0]), (10, [3, 0]), (20, [3, 7])):
            replicas.follow(order, start, weights_R, may_fill=False)
            assert (replicas.live_number, replicas.filled) == (0, 0)
            for step in range(start + 1, start + 6):
                replicas.follow(order, step, weights_R, may_fill=True)
            assert (replicas.live_number, replicas.filled) == (5, 4)

    VirtualGroup(2, CPU).run(body)
