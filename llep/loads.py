"""Loads of ranks: what a plan is judged by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Loads = Sequence[int] | npt.NDArray[np.int64]


def imbalance_ratio(rank_loads: Loads) -> float:
    """Max / mean of rank loads: 1.0 is perfect, also for an empty batch."""
    total = int(sum(rank_loads))
    return int(max(rank_loads)) * len(rank_loads) / total if total else 1.0


def balancedness_ratio(rank_loads: Loads) -> float:
    """Mean / max of rank loads: 1.0 is perfect. Reported only; every threshold is about the imbalance ratio."""
    return 1.0 / imbalance_ratio(rank_loads)


def home_loads(tokens_per_expert: Loads, home_rank: Sequence[int], ep_size: int) -> list[int]:
    """Load of each rank under plain EP: every pair is computed on its expert's home rank."""
    loads = [0] * ep_size
    for expert, tokens in enumerate(tokens_per_expert):
        loads[home_rank[expert]] += int(tokens)
    return loads


def skewed_counts(
    num_ranks: int, num_experts: int, pairs_per_rank: int, hot_experts: Sequence[int], hot_share: float, seed: int
) -> npt.NDArray[np.int64]:
    """Random counts [num_ranks, num_experts]; `hot_share` of each rank's pairs go to `hot_experts` (paper, sec. 5)."""
    rng = np.random.default_rng(seed)
    weights = np.full(num_experts, (1.0 - hot_share) / max(num_experts - len(hot_experts), 1))
    weights[list(hot_experts)] = hot_share / len(hot_experts)
    return rng.multinomial(pairs_per_rank, weights / weights.sum(), size=num_ranks).astype(np.int64)
