"""The plan of one layer and one batch: which rank computes which share of each expert's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from llep.loads import Loads
from llep.placement import Placement


class Decision(StrEnum):
    """Why a layer was or was not balanced in a step. A closed set: these are metric labels."""

    LEND = "lend"
    BALANCED = "balanced"
    SMALL_BATCH = "small_batch"
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


@dataclass(frozen=True, slots=True)
class Plan:
    """Segments in increasing (expert, start), together covering every token exactly once; equal on all ranks."""

    decision: Decision
    placement: Placement
    segments: tuple[Segment, ...]

    @property
    def lends(self) -> tuple[Lend, ...]:
        """One per (expert, rank) that computes away from home, in increasing (expert, rank)."""
        tokens: dict[tuple[int, int], int] = {}
        for segment in self.segments:
            if segment.rank != self.placement.home_rank[segment.expert]:
                key = (segment.expert, segment.rank)
                tokens[key] = tokens.get(key, 0) + segment.stop - segment.start
        return tuple(
            Lend(expert, self.placement.home_rank[expert], rank, count)
            for (expert, rank), count in sorted(tokens.items())
        )

    @property
    def rank_loads(self) -> list[int]:
        """Pairs computed by each rank under this plan."""
        loads = [0] * self.placement.ep_size
        for segment in self.segments:
            loads[segment.rank] += segment.stop - segment.start
        return loads

    def digest(self) -> int:
        """A 63-bit digest; ranks that hold equal plans hold equal digests."""
        data = np.array([tuple(s) for s in self.segments], dtype="<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


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
    plain = [0] * plan.placement.ep_size
    for expert, tokens in enumerate(tokens_per_expert):
        plain[plan.placement.home_rank[expert]] += int(tokens)
    assert max(plan.rank_loads) <= max(plain), "the plan's maximum load is above plain EP's"


def home_segments(tokens_per_expert: Loads, home_rank: Sequence[int]) -> tuple[Segment, ...]:
    """Plain EP's segments: each expert's tokens, all on its home rank."""
    return tuple(
        Segment(expert, home_rank[expert], 0, int(tokens)) for expert, tokens in enumerate(tokens_per_expert) if tokens
    )
