"""The plan of one layer and one batch: which rank computes which tokens of each expert, and who sends weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llep.loads import Loads, home_loads
from llep.placement import Placement

# From this many receivers on, those that have an expert's weights pass them on: one sender would be the bottleneck.
RELAY_FAN_OUT = 4


class Decision(StrEnum):
    """Why a layer was or was not balanced in a step. A closed set: these are metric labels."""

    LEND = "lend"
    REPLICA = "replica"  # balanced by resident replicas alone
    BALANCED = "balanced"
    SMALL_BATCH = "small_batch"
    PROBE = "probe"  # would lend, but is left to plain EP to measure what lending is worth
    NO_GAIN = "no_gain"
    NO_SLOT = "no_slot"
    MEMORY = "memory"
    OFF = "off"
    ERROR = "error"


class Segment(NamedTuple):
    """Tokens [start, stop) of one expert, in the global order (rank 0's tokens first), computed by `rank`."""

    expert: int
    rank: int
    start: int
    stop: int


class Lend(NamedTuple):
    """A copy of one expert's weights for one layer of one step; `tokens` are what `dst_rank` computes with it."""

    expert: int
    src_rank: int
    dst_rank: int
    tokens: int


class Transfer(NamedTuple):
    """One hop of a lend: in round `round` (0, 1, ...) `src_rank`, which has the weights by then, sends them on."""

    expert: int
    src_rank: int
    dst_rank: int
    round: int


class Plan:
    """Segments in increasing (expert, start), together covering every token exactly once; equal on all ranks.

    segments: Segments, or an int64 array [S, 4] of them, which the plan then owns. ranks_per_node: None is one node.
    predicted_gain_s: what the cost model says the plan saves against plain EP; 0 without a cost model.
    """

    def __init__(
        self,
        decision: Decision,
        placement: Placement,
        segments: Sequence[Segment] | npt.NDArray[np.int64],
        *,
        ranks_per_node: int | None = None,
        predicted_gain_s: float = 0.0,
    ) -> None:
        self.decision = decision
        self.placement = placement
        self.segments_S4 = (
            segments if isinstance(segments, np.ndarray) else np.array(segments, dtype=np.int64).reshape(-1, 4)
        )
        self.ranks_per_node = ranks_per_node
        self.predicted_gain_s = predicted_gain_s

    def __repr__(self) -> str:
        return f"Plan({self.decision.value}, {len(self.segments_S4)} segments, {len(self.lends)} lends)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Plan)
            and (self.decision, self.placement, self.ranks_per_node, self.predicted_gain_s)
            == (other.decision, other.placement, other.ranks_per_node, other.predicted_gain_s)
            and np.array_equal(self.segments_S4, other.segments_S4)
        )

    def __hash__(self) -> int:
        return self.digest()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(map(Segment._make, self.segments_S4.tolist()))

    @cached_property
    def lends(self) -> tuple[Lend, ...]:
        """One per (expert, rank) that computes without having the weights, in increasing (expert, rank)."""
        tokens: dict[tuple[int, int], int] = {}
        away_S4 = self.segments_S4[self.segments_S4[:, 1] != self.placement.home_rank_E[self.segments_S4[:, 0]]]
        for expert, rank, start, stop in away_S4.tolist():
            if rank not in self.placement.holders[expert]:
                tokens[expert, rank] = tokens.get((expert, rank), 0) + stop - start
        return tuple(Lend(e, self._nearest_holder(e, rank), rank, tokens[e, rank]) for e, rank in sorted(tokens))

    def _nearest_holder(self, expert: int, rank: int) -> int:
        holders, node = self.placement.holders[expert], node_of(rank, self.ranks_per_node)
        return next((holder for holder in holders if node_of(holder, self.ranks_per_node) == node), holders[0])

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """The hops that carry the lends, in increasing (round, expert, dst_rank)."""
        receivers: dict[int, list[int]] = {}
        for lend in self.lends:
            receivers.setdefault(lend.expert, []).append(lend.dst_rank)
        return relay(receivers, self.placement, self.ranks_per_node)

    @property
    def rank_loads(self) -> list[int]:
        """Pairs computed by each rank under this plan."""
        loads = np.zeros(self.placement.ep_size, dtype=np.int64)
        np.add.at(loads, self.segments_S4[:, 1], self.segments_S4[:, 3] - self.segments_S4[:, 2])
        values: list[int] = loads.tolist()
        return values

    def digest(self) -> int:
        """A 63-bit digest; ranks that hold equal plans hold equal digests."""
        data = self.segments_S4.astype("<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def node_of(rank: int, ranks_per_node: int | None) -> int:
    """Ranks 0..ranks_per_node-1 are node 0 and so on; None is one node."""
    return rank // ranks_per_node if ranks_per_node else 0


def relay(
    receivers: Mapping[int, Sequence[int]], placement: Placement, ranks_per_node: int | None
) -> tuple[Transfer, ...]:
    """The relay tree of each expert, in increasing (round, expert, dst_rank). receivers[expert] are increasing ranks.

    Weights cross to a node at most once, to its lowest receiver, and go on from there.
    """
    hops: list[Transfer] = []
    for expert, ranks in receivers.items():
        holders, first_rounds = defaultdict[int, list[int]](list), defaultdict[int, int](int)
        in_node: dict[int, list[int]] = {}
        for rank in placement.holders[expert]:
            holders[node_of(rank, ranks_per_node)].append(rank)
        for rank in ranks:
            in_node.setdefault(node_of(rank, ranks_per_node), []).append(rank)
        entries = [in_node[node].pop(0) for node in in_node if node not in holders]
        for hop in _fan_out(expert, placement.holders[expert], entries, 0):
            hops.append(hop)
            node = node_of(hop.dst_rank, ranks_per_node)
            holders[node], first_rounds[node] = [hop.dst_rank], hop.round + 1
        for node, others in in_node.items():
            hops += _fan_out(expert, holders[node], others, first_rounds[node])
    return tuple(sorted(hops, key=lambda hop: (hop.round, hop.expert, hop.dst_rank)))


def _fan_out(expert: int, holders: Sequence[int], receivers: Sequence[int], first_round: int) -> Iterable[Transfer]:
    """Hops from holders to receivers: all at once if they are few, else each round all that have the weights send."""
    senders, position, round_ = list(holders), 0, first_round
    is_relayed = len(receivers) >= RELAY_FAN_OUT
    while position < len(receivers):
        batch = receivers[position : position + len(senders)] if is_relayed else receivers
        for index, rank in enumerate(batch):
            yield Transfer(expert, senders[index % len(senders)], rank, round_)
        senders += batch
        position += len(batch)
        round_ += 1


def check_plan(plan: Plan, tokens_per_expert: Loads) -> None:
    """Raise AssertionError unless the plan computes every token once, within the slots, never above plain EP's load."""
    position = [0] * len(tokens_per_expert)
    for previous, segment in zip((None, *plan.segments), plan.segments, strict=False):
        assert previous is None or (previous.expert, previous.start) < (segment.expert, segment.start), "out of order"
        assert segment.start == position[segment.expert], f"gap or overlap at {segment}"
        assert segment.stop > segment.start, f"empty {segment}"
        position[segment.expert] = segment.stop
    assert position == [int(n) for n in tokens_per_expert], "not every token is computed exactly once"
    borrowed = [0] * plan.placement.ep_size
    for lend in plan.lends:
        borrowed[lend.dst_rank] += 1
    for rank, (used, free) in enumerate(zip(borrowed, plan.placement.free_slots, strict=True)):
        assert used <= free, f"rank {rank} borrows {used} experts but has {free} slots"
    plain = home_loads(tokens_per_expert, plan.placement.home_rank, plan.placement.ep_size)
    assert max(plan.rank_loads) <= max(plain), "the plan's maximum load is above plain EP's"


def home_segments(tokens_per_expert: Loads, placement: Placement) -> npt.NDArray[np.int64]:
    """Plain EP's segments [S, 4]: each expert's tokens, all on its home rank."""
    tokens_E = np.asarray(tokens_per_expert, dtype=np.int64)
    experts_S = np.flatnonzero(tokens_E)
    segments_S4 = np.zeros((len(experts_S), 4), dtype=np.int64)
    segments_S4[:, 0] = experts_S
    segments_S4[:, 1] = placement.home_rank_E[experts_S]
    segments_S4[:, 3] = tokens_E[experts_S]
    return segments_S4
