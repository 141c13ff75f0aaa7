"""Where weights live across steps: the home rank and resident replicas of each expert, and free slots per rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class PlacementArrays(NamedTuple):
    """A placement as int64 arrays. Instances are copies of experts: 0..E-1 the home ones, then the replicas in order.

    rank_instances[rank_starts[r] : rank_starts[r + 1]] are those on rank r; replicas of expert e are the instances
    E + replica_starts[e] up to E + replica_starts[e + 1].
    """

    slots_R: npt.NDArray[np.int64]
    instance_expert_I: npt.NDArray[np.int64]
    instance_rank_I: npt.NDArray[np.int64]
    rank_starts: npt.NDArray[np.int64]
    rank_instances: npt.NDArray[np.int64]
    replica_starts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """The weights of one layer on the ranks of an EP group. ValueError when it contradicts itself.

    home_rank[expert] is a rank in 0..ep_size-1; free_slots[rank] bounds the experts lent to that rank in one step.
    replicas are the (expert, rank) pairs of second copies that stay across steps; the slots they fill are not free.
    """

    home_rank: tuple[int, ...]
    free_slots: tuple[int, ...]
    replicas: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.free_slots:
            raise ValueError("free_slots must have one entry per rank, got none: an EP group has at least 1 rank")
        if not self.home_rank:
            raise ValueError("home_rank must have one entry per expert, got none")
        for rank, slots in enumerate(self.free_slots):
            if not 0 <= slots <= self.num_experts:
                raise ValueError(f"free_slots must be in 0..{self.num_experts} (experts), got {slots} for rank {rank}")
        for expert, home in enumerate(self.home_rank):
            self._check_rank("home_rank", home, expert)
        seen = set(enumerate(self.home_rank))
        for expert, rank in self.replicas:
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"replicas must be of experts 0..{self.num_experts - 1}, got expert {expert}")
            self._check_rank("replicas", rank, expert)
            if (expert, rank) in seen:
                raise ValueError(f"replicas: rank {rank} would hold expert {expert} twice; one copy per rank is enough")
            seen.add((expert, rank))
        if list(self.replicas) != sorted(self.replicas):
            object.__setattr__(self, "replicas", tuple(sorted(self.replicas)))

    def _check_rank(self, name: str, rank: int | None, expert: int) -> None:
        if rank is None or not 0 <= rank < self.ep_size:
            raise ValueError(f"{name} must be a rank in 0..{self.ep_size - 1}, got {rank} for expert {expert}")

    @property
    def ep_size(self) -> int:
        return len(self.free_slots)

    @property
    def num_experts(self) -> int:
        return len(self.home_rank)

    @cached_property
    def home_rank_E(self) -> npt.NDArray[np.int64]:
        return np.array(self.home_rank, dtype=np.int64)

    @cached_property
    def arrays(self) -> PlacementArrays:
        """What the compiled planners read; made once per placement."""
        instances = [*enumerate(self.home_rank), *self.replicas]
        experts_I, ranks_I = (np.array(column, dtype=np.int64) for column in zip(*instances, strict=True))
        return PlacementArrays(
            slots_R=np.array(self.free_slots, dtype=np.int64),
            instance_expert_I=experts_I,
            instance_rank_I=ranks_I,
            rank_starts=_starts(ranks_I, self.ep_size),
            rank_instances=np.argsort(ranks_I, kind="stable").astype(np.int64),
            replica_starts=_starts(experts_I[self.num_experts :], self.num_experts),
        )

    @cached_property
    def without_slots(self) -> Placement:
        """The same replicas, and nothing can be lent."""
        return Placement(self.home_rank, (0,) * self.ep_size, self.replicas)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that have each expert's weights across steps: home first, then replicas by rank."""
        ranks = [[home] for home in self.home_rank]
        for expert, rank in self.replicas:
            ranks[expert].append(rank)
        return tuple(tuple(of_expert) for of_expert in ranks)

    @classmethod
    def linear(cls, num_experts: int, ep_size: int, slots_per_rank: int | Sequence[int]) -> Placement:
        """Experts in contiguous blocks, the first `num_experts % ep_size` ranks with one more (vLLM's default)."""
        base, extra = divmod(num_experts, ep_size)
        sizes = [base + (rank < extra) for rank in range(ep_size)]
        slots = (slots_per_rank,) * ep_size if isinstance(slots_per_rank, int) else tuple(slots_per_rank)
        return cls(tuple(rank for rank, size in enumerate(sizes) for _ in range(size)), slots)


def _starts(keys: npt.NDArray[np.int64], num_keys: int) -> npt.NDArray[np.int64]:
    """Where each key's run starts among the sorted keys, and where the last ends."""
    return np.concatenate(([0], np.cumsum(np.bincount(keys, minlength=num_keys)))).astype(np.int64)


def ranks_per_node(machines: Sequence[int]) -> int | None:
    """How many adjacent ranks share a machine, if it is as many on each; None: one machine, or no such order.

    machines: a number for the machine of each rank.
    """
    per_node = machines.index(next((m for m in machines if m != machines[0]), machines[0])) or None
    if per_node is None or len(machines) % per_node:
        return None
    nodes = [machines[first : first + per_node] for first in range(0, len(machines), per_node)]
    is_regular = all(len(set(node)) == 1 for node in nodes) and len({node[0] for node in nodes}) == len(nodes)
    return per_node if is_regular else None
