"""What a step planner is told besides the counts and the placement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from llep.placement import Placement
from llep.plan import Decision

if TYPE_CHECKING:
    from llep.cost import CostModel

NO_LIMIT = 1 << 62
MAX_COUNT = (1 << 31) - 1  # so that no sum or product of counts leaves 64 bits


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Limits and thresholds of one plan; the first three are the paper's lambda, alpha, m. ValueError when invalid."""

    imbalance_threshold: float = 1.3  # max / mean of rank loads from which a layer is balanced
    capacity_factor: float = 1.0  # rank capacity / mean rank load; raising it lends less and lets ranks run hotter
    min_chunk_tokens: int = 1024  # fewest pairs worth lending an expert for
    bytes_per_expert: int = 0  # one expert's weights in one layer; 0: unknown, then no limit in bytes can be given
    max_lend_bytes: int = 0  # most bytes lent in this layer over all ranks; 0: no limit
    free_bytes: tuple[int, ...] | None = None  # per rank, what lent weights may take; None: slots alone limit
    ranks_per_node: int | None = None  # ranks 0..n-1 are node 0 and so on; None: one node
    lend_scope: Literal["any", "node"] = "any"  # node: lend only within a node
    phase: Literal["prefill", "decode"] = "prefill"
    cost_model: CostModel | None = None  # None: plans are taken without asking whether they pay

    def __post_init__(self) -> None:
        _check_number("imbalance_threshold", self.imbalance_threshold, 1)
        _check_number("capacity_factor", self.capacity_factor, 1)
        _check_count("min_chunk_tokens", self.min_chunk_tokens, 1)
        _check_count("bytes_per_expert", self.bytes_per_expert, 0)
        _check_count("max_lend_bytes", self.max_lend_bytes, 0)
        for rank, free in enumerate(self.free_bytes or ()):
            _check_count(f"free_bytes[{rank}]", free, 0)
        if self.ranks_per_node is not None:
            _check_count("ranks_per_node", self.ranks_per_node, 1)
        if (self.max_lend_bytes or self.free_bytes is not None) and not self.bytes_per_expert:
            raise ValueError("max_lend_bytes and free_bytes limit bytes: give bytes_per_expert > 0 too, got 0")
        for name, value, allowed in (
            ("lend_scope", self.lend_scope, ("any", "node")),
            ("phase", self.phase, ("prefill", "decode")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @cached_property
    def free_bytes_R(self) -> npt.NDArray[np.int64]:
        """free_bytes as an array, empty without; made once per options."""
        return np.array(self.free_bytes or (), dtype=np.int64)


def lend_slots(placement: Placement, options: PlanOptions) -> list[int]:
    """Experts that each rank can borrow within its slots and its free bytes."""
    if options.free_bytes is None:
        return list(placement.free_slots)
    fitting = (free // options.bytes_per_expert for free in options.free_bytes)
    return [min(slots, fits) for slots, fits in zip(placement.free_slots, fitting, strict=True)]


def max_lends(options: PlanOptions) -> int:
    """Most lends in one plan by max_lend_bytes."""
    return options.max_lend_bytes // options.bytes_per_expert if options.max_lend_bytes else NO_LIMIT


def refuse_counts(counts_RE: npt.NDArray[np.int64]) -> None:
    """ValueError naming the first count that is out of range, if one is."""
    if counts_RE.size and not 0 <= counts_RE.min() <= counts_RE.max() <= MAX_COUNT:
        rank, expert = np.argwhere((counts_RE < 0) | (counts_RE > MAX_COUNT))[0]
        count = counts_RE[rank, expert]
        raise ValueError(f"counts must be in 0..{MAX_COUNT}, got {count} from rank {rank} to expert {expert}")


def refusal(plain: Sequence[int], placement: Placement, options: PlanOptions) -> Decision:
    """Why nothing was lent: no slot where there is room, slots but no bytes, or nothing that helps."""
    mean = sum(plain) / len(plain)
    has_room = [load < mean for load in plain]
    slots = lend_slots(placement, options)
    if max_lends(options) and any(n for n, is_helper in zip(slots, has_room, strict=True) if is_helper):
        return Decision.NO_GAIN
    is_memory = any(n for n, is_helper in zip(placement.free_slots, has_room, strict=True) if is_helper)
    return Decision.MEMORY if is_memory else Decision.NO_SLOT


def _check_number(name: str, value: float, lowest: float) -> None:
    if not (math.isfinite(value) and value >= lowest):
        raise ValueError(f"{name} must be a number >= {lowest}, got {value}")


def _check_count(name: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
