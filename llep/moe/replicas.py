"""Resident replicas of one rank: copies of experts that stay across steps, filled between steps, switched on together.

Who enters what, in which order, on every rank of the EP group, also an idle one and one with zero tokens: nothing but
the step's header, which all ranks gather anyway before the first layer (llep.moe.agreement). From it every rank knows
the same placement order, rank 0's clock, and whose weights were loaded anew. `follow` then does the same on all:

1. Weights loaded anew on any rank: every replica is dropped, for it may be a copy of what was. Each rank counts loads
   in its own way, so their numbers need not be equal: only a change says something.
2. Another order: replicas that it does not have are dropped at once, the others stay where they are and go on acting.
3. What is missing is copied in increasing (layer, expert, rank), at most one layer's in a step, and no more than the
   order's bytes per second allow by rank 0's clock. A copy goes point to point from the home rank into a free row of
   the receiver's room; both post in the order of copies, wait, and only then enter the first layer. Who neither sends
   nor receives does nothing.
4. With the last copy the placement is switched on, in that step, on all ranks: whoever is sent tokens of a replica has
   waited for it before it entered the layer that asks for it.

To go back is an order like any other: what it has is kept, what it has not is dropped, and without an order all is.
Outside of mode active nothing is copied, and planners use none; what is in place stays.

Room is reserved once per shape of experts, before the KV cache is sized: rows that layers of that shape share. Which
row holds which copy follows from the orders alone, so every rank knows it of all.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from llep.errors import LlepError, UnsupportedConfiguration
from llep.messages import PlacementOrder
from llep.moe.captured import DeviceMap
from llep.moe.layer import Group, LeastLoadedMoE
from llep.moe.slots import Copy, Residents, bytes_per_expert, zeros_like_experts
from llep.placement import Placement

logger = logging.getLogger("vllm.llep")

Replica = tuple[int, int, int]  # (layer's place, expert, rank)

MOST_BYTES_PER_STEP = 64 << 20  # that a rank sends and receives, but at least one copy: a step is held up for no more
LONGEST_PAUSE_S = 1.0  # between two steps, that counts for how much may be copied


class BadPlacement(LlepError, ValueError):
    """A placement order that can't be followed: it is refused on every rank, and what holds stays."""

    code = "bad_placement"


@dataclass(frozen=True, slots=True)
class Room:
    """Rows for replicas of experts of one shape, on this rank: bank[name] is [rows, *weights[name].shape[1:]]."""

    rows: int
    bank: Mapping[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.bank.values())

    @classmethod
    def reserve(
        cls, weights: Mapping[str, torch.Tensor], rows: int, budget_bytes: int = 0, available_bytes: int | None = None
    ) -> Room:
        """Room for so many experts shaped like `weights`, touched at once. Raises UnsupportedConfiguration."""
        needed = rows * bytes_per_expert(weights)
        where = f"replica_slots_per_rank={rows}: room for resident replicas, {needed} bytes per rank,"
        if budget_bytes and needed >= budget_bytes:
            raise UnsupportedConfiguration(
                f"{where} is all of memory_budget_bytes={budget_bytes} or more: raise that, or lower "
                "replica_slots_per_rank",
                param="replica_slots_per_rank",
            )
        if available_bytes is not None and needed > available_bytes:
            raise UnsupportedConfiguration(
                f"{where} is more than the {available_bytes} bytes that each rank on this machine can have: lower it",
                param="replica_slots_per_rank",
            )
        try:
            return cls(rows, {name: zeros_like_experts(tensor, rows) for name, tensor in weights.items()})
        except (RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedConfiguration(
                f"{where} can't be reserved: lower it ({reason})", param="replica_slots_per_rank"
            ) from error


NO_ROOM = Room(0, {})


@dataclass(slots=True)
class PlacedLayer:
    """One MoE layer and where its experts are now. `home` is without replicas; device_map tells captured steps."""

    moe: LeastLoadedMoE
    home: Placement
    room: Room
    bytes_per_expert: int
    device_map: DeviceMap | None = None
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.placement = self.home


class Replicas:
    """The replicas of all layers, as this rank knows them of all ranks, and where this rank has its own.

    live_number: the order that is switched on, 0 if none is; what stays of it acts while the next is filled.
    filled: copies of the order under way that are in place, acting ones too. used_bytes: what this rank's replicas take
    of its room; peak_bytes: the most that they have. These are read by another thread.
    """

    def __init__(self, transport: Group) -> None:
        self.layers: list[PlacedLayer] = []
        self.live_number = self.filled = self.used_bytes = self.peak_bytes = 0
        self._transport = transport
        self._order: PlacementOrder | None = None
        self._acting: dict[Replica, int] = {}  # -> row of the replica's rank's room
        self._filled: dict[Replica, int] = {}  # in place, to be switched on with the rest
        self._missing: list[Copy] = []
        self._allowance = 0.0
        self._clock_s = math.inf  # before the first step no time has passed
        self._weights_R: list[int] = []
        self._times_placed = 0
        self._mapped: object = None

    def add_layer(
        self, moe: LeastLoadedMoE, home: Placement, room: Room = NO_ROOM, device_map: DeviceMap | None = None
    ) -> PlacedLayer:
        """One more layer, the next in order; layers whose experts have one shape share a room."""
        self.layers.append(PlacedLayer(moe, home, room, bytes_per_expert(moe.experts.weights), device_map))
        return self.layers[-1]

    def check(self, order: PlacementOrder, num_layers: int | None = None) -> None:
        """Raise BadPlacement if the order can't be followed. num_layers: of how many layers it may speak."""
        layers = self.layers[:num_layers]
        used: Counter[tuple[int, int]] = Counter()
        if order.bytes_per_s < 1:
            raise BadPlacement(f"placement {order.number}: bytes_per_s={order.bytes_per_s} must be at least 1")
        for replica in order.replicas:
            layer, expert, rank = replica
            if not 0 <= layer < len(layers):
                raise BadPlacement(f"placement {order.number}: unknown layer: place {layer} of {len(layers)} layers")
            home = layers[layer].home
            where = f"placement {order.number}, layer place {layer}"
            if not 0 <= expert < home.num_experts:
                raise BadPlacement(f"{where}: unknown expert {expert} of {home.num_experts}")
            if not 0 <= rank < home.ep_size:
                raise BadPlacement(f"{where}: unknown rank {rank} of {home.ep_size}")
            if home.home_rank[expert] == rank:
                raise BadPlacement(f"{where}: a copy at home: expert {expert} lives on rank {rank}")
            room = layers[layer].room
            used[id(room), rank] += 1
            if used[id(room), rank] > room.rows:
                raise BadPlacement(
                    f"placement {order.number}: more copies than room: rank {rank} has room for {room.rows}, see "
                    "replica_slots_per_rank"
                )
        if len(set(order.replicas)) < len(order.replicas):
            double = next(replica for replica, times in Counter(order.replicas).items() if times > 1)
            raise BadPlacement(
                f"placement {order.number}: doubles: layer place {double[0]}, expert {double[1]} on rank {double[2]}"
            )

    def follow(self, order: PlacementOrder | None, clock_s: float, weights_R: Sequence[int], *, may_fill: bool) -> None:
        """Before a step's first layer: come as far as may be. Every rank enters it, with equal arguments.

        clock_s: rank 0's. weights_R: how often each rank's weights were loaded so far. may_fill: copies may be made.
        """
        before = self._acting, self._filled
        if list(weights_R) != self._weights_R:
            self._weights_R = list(weights_R)
            if self.filled:
                logger.info(
                    "llep: weights were loaded anew, or woken up: all %d resident replicas are dropped", self.filled
                )
            self._acting, self._filled, self.live_number, self._order = {}, {}, 0, None
        if order is not self._order:
            if order != self._order:
                self._take(order)
            self._order = order
        if order is not None and self._missing and may_fill:
            self._fill(order.bytes_per_s, clock_s)
        self._clock_s = clock_s
        if order is not None and not self._missing and self.live_number != order.number:
            self._acting = {**self._acting, **self._filled}
            self._filled = {}
            self.live_number = order.number
            logger.info("llep: placement %d is switched on: %d resident replicas", order.number, len(self._acting))
        if self._acting is not before[0]:
            self._place()
        if self._acting is not before[0] or self._filled is not before[1]:
            in_place = [*self._acting, *self._filled]
            mine = [layer for layer, _, rank in in_place if rank == self._transport.rank]
            self.filled = len(in_place)
            self.used_bytes = sum(self.layers[layer].bytes_per_expert for layer in mine)
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def map_captured(self, rule: object, acts: Callable[[int, Placement], bool]) -> None:
        """After `follow`: tell captured steps which replicas act now. Every rank enters it, with equal arguments.

        acts(layer's place, placement): whether its replicas are to be used at all; asked again when `rule` changes.
        """
        if self._mapped == (rule, self._times_placed):
            return
        self._mapped = rule, self._times_placed
        for place, placed in enumerate(self.layers):
            if placed.device_map is not None:
                placement = placed.placement if acts(place, placed.placement) else placed.home
                placed.device_map.follow(placement, placed.moe.residents.row_of)

    def home_only(self) -> None:
        """Weights are being loaded on this rank: captured steps use no replica before the next `follow`."""
        for placed in self.layers:
            if placed.device_map is not None:
                placed.device_map.home_only()

    def restore_maps(self) -> None:
        """This rank has woken up: as `home_only`, also where the maps are lost."""
        for placed in self.layers:
            if placed.device_map is not None:
                placed.device_map.restore()

    def _take(self, order: PlacementOrder | None) -> None:
        self._allowance = 0.0
        wanted = set(order.replicas) if order is not None else set()
        if not wanted >= self._acting.keys():
            self._acting = {replica: row for replica, row in self._acting.items() if replica in wanted}
        if order is None or not self._acting:
            self.live_number = 0
        self._filled = {replica: row for replica, row in self._filled.items() if replica in wanted}
        in_place = {**self._acting, **self._filled}
        taken = {(id(self.layers[layer].room), rank, row) for (layer, _, rank), row in in_place.items()}
        self._missing = []
        for replica in sorted(wanted - in_place.keys()):
            layer, expert, rank = replica
            placed = self.layers[layer]
            row = next(row for row in range(placed.room.rows) if (id(placed.room), rank, row) not in taken)
            taken.add((id(placed.room), rank, row))
            self._missing.append(Copy(layer, expert, placed.home.home_rank[expert], rank, row))

    def _fill(self, bytes_per_s: int, clock_s: float) -> None:
        placed = self.layers[self._missing[0].layer]
        most = max(min(bytes_per_s, MOST_BYTES_PER_STEP), placed.bytes_per_expert)
        elapsed_s = min(max(clock_s - self._clock_s, 0.0), LONGEST_PAUSE_S)
        self._allowance = min(self._allowance + bytes_per_s * elapsed_s, most)
        due, spent = self._due()
        if not due:
            return
        moe = placed.moe
        self._transport.start_copies(due, moe.experts.weights, moe.local_ids, placed.room.bank).wait()
        self._allowance -= spent
        self._missing = self._missing[len(due) :]
        self._filled = {**self._filled, **{(copy.layer, copy.expert, copy.dst_rank): copy.row for copy in due}}

    def _due(self) -> tuple[list[Copy], int]:
        """The next copies, all of one layer, that the allowance holds on every rank; and the most bytes on one."""
        moved: Counter[int] = Counter()
        due: list[Copy] = []
        spent = 0
        for copy in self._missing:
            if copy.layer != self._missing[0].layer:
                break
            for rank in (copy.src_rank, copy.dst_rank):
                moved[rank] += self.layers[copy.layer].bytes_per_expert
            if max(moved.values()) > self._allowance:
                break
            due.append(copy)
            spent = max(moved.values())
        return due, spent

    def _place(self) -> None:
        """Tell planners and layers what acts."""
        self._times_placed += 1
        of_layer: dict[int, dict[tuple[int, int], int]] = {}
        for (layer, expert, rank), row in self._acting.items():
            of_layer.setdefault(layer, {})[expert, rank] = row
        for layer, placed in enumerate(self.layers):
            rows = of_layer.get(layer, {})
            if tuple(sorted(rows)) != placed.placement.replicas:
                placed.placement = replace(placed.home, replicas=tuple(sorted(rows)))
            mine = {expert: row for (expert, rank), row in rows.items() if rank == self._transport.rank}
            placed.moe.residents = Residents(placed.room.bank, mine)
