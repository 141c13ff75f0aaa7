"""Where weights live across steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Home rank of each expert of one layer, and the slots each rank has free for lends.

    home_rank[expert] is a rank in 0..ep_size-1; free_slots[rank] bounds the experts lent to that rank in one step.
    """

    home_rank: tuple[int, ...]
    free_slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.free_slots:
            raise ValueError("free_slots must have one entry per rank, got none: an EP group has at least 1 rank")
        for rank, slots in enumerate(self.free_slots):
            if slots < 0:
                raise ValueError(f"free_slots must be >= 0, got {slots} for rank {rank}")
        for expert, rank in enumerate(self.home_rank):
            if not 0 <= rank < len(self.free_slots):
                raise ValueError(
                    f"home_rank must be in 0..{len(self.free_slots) - 1}, got {rank} for expert {expert}"
                )

    @property
    def ep_size(self) -> int:
        return len(self.free_slots)

    @property
    def num_experts(self) -> int:
        return len(self.home_rank)

    @classmethod
    def linear(cls, num_experts: int, ep_size: int, slots_per_rank: int | Sequence[int]) -> Placement:
        """Experts in contiguous blocks, the first `num_experts % ep_size` ranks with one more (vLLM's default)."""
        base, extra = divmod(num_experts, ep_size)
        sizes = [base + (rank < extra) for rank in range(ep_size)]
        slots = (slots_per_rank,) * ep_size if isinstance(slots_per_rank, int) else tuple(slots_per_rank)
        return cls(tuple(rank for rank, size in enumerate(sizes) for _ in range(size)), slots)
