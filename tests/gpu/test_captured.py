"""Replicas in steps that are replayed from a real CUDA graph: what was captured follows the placement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llep.messages import PlacementOrder
from llep.moe.captured import DeviceMap, compute_captured
from llep.moe.replicas import PlacedLayer, Replicas, Room
from llep.moe.virtual import VirtualGroup, VirtualTransport
from llep.placement import Placement
from tests.layers import HIDDEN, LARGE, TOP_K, ChosenSwiglu, make_layer_on, reference, routed_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

EXPERTS, RANKS, ROOM, TOKENS = 12, 2, 4, 24
ORDERS = (None, PlacementOrder(1, ((0, 0, 1), (0, 1, 1), (0, 7, 0)), 1 << 40), PlacementOrder(2, ((0, 2, 1),), 1 << 40))


class Captured:
    """One rank's layer, captured once, for whatever is in its buffers then."""

    def __init__(self, placed: PlacedLayer, device: torch.device) -> None:
        self.hidden = torch.zeros(TOKENS, HIDDEN, device=device)
        self.gates = torch.zeros(TOKENS, TOP_K, device=device)
        self.ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32, device=device)
        experts, device_map = placed.moe.experts, placed.device_map
        assert isinstance(experts, ChosenSwiglu) and device_map is not None

        def run() -> torch.Tensor:
            return compute_captured(experts, placed.room.bank, device_map, self.hidden, self.gates, self.ids)

        run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = run()

    def replay(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for buffer, tensor in zip((self.hidden, self.gates, self.ids), batch, strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        return self._output.clone()


def test_what_was_captured_follows_the_placement() -> None:
    device = torch.device("cuda", 0)
    home = Placement.linear(EXPERTS, RANKS, 0)
    rng = np.random.default_rng(0)
    batches = [routed_tokens(rng, TOKENS, EXPERTS, [0, 1], 0.8) for _ in ORDERS]

    def body(transport: VirtualTransport) -> list[torch.Tensor]:
        replicas = Replicas(transport)
        moe = make_layer_on(transport, home.home_rank, 0, LARGE)
        room = Room.reserve(moe.experts.weights, ROOM)
        device_map = DeviceMap(home, moe.local_ids, transport.rank, ROOM, device)
        placed = replicas.add_layer(moe, home, room, device_map)
        captured = in_turn(transport, lambda: Captured(placed, device))
        outputs = []
        for number, (order, batch) in enumerate(zip(ORDERS, batches, strict=True)):
            for step in range(3):  # a clock that goes on lets copies be made
                replicas.follow(order, 100.0 * number + step, [0] * RANKS, may_fill=True)
            replicas.map_captured(number, lambda place, placement: True)
            assert bool(placed.placement.replicas) == (order is not None)
            output = captured.replay(batch)
            transport.add_up(output, "outputs")
            outputs.append(output.cpu())
        return outputs

    for outputs in VirtualGroup(RANKS, device).run(body):
        for output, batch in zip(outputs, batches, strict=True):
            torch.testing.assert_close(output, reference(*batch, EXPERTS), rtol=1e-4, atol=1e-4)


def in_turn(transport: VirtualTransport, make: Callable[[], Captured]) -> Captured:
    """Graphs are captured one after the other."""
    found = None
    for rank in range(transport.size):
        if rank == transport.rank:
            found = make()
        transport.gather(torch.zeros(1, device=transport.device), "turn")
    assert found is not None
    return found
