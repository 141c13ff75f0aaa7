"""The best split of one layer's expert loads over the copies it has, and what further copies would do.

Splitting so that the sum of squared rank loads is least also makes the highest rank load least; it is reached by
splitting one expert after the other over its copies, again and again. Plain numbers and dicts: experts have few copies.

Shape letters: E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SWEEPS = 100
TRIAL_SWEEPS = 8
NEAR_SWEEPS = 2
TOLERANCE = 1e-6  # of the mean rank load


class Parts(NamedTuple):
    """The part, above 0 and up to 1, of each expert's load that each rank carries."""

    expert_N: Ids
    rank_N: Ids
    part_N: Floats


class Split:
    """Loads of experts over their copies: at home, and on the ranks they were added to. Loads are never negative."""

    def __init__(self, loads_E: Floats, home_E: Ids, num_ranks: int) -> None:
        self._loads: list[float] = loads_E.tolist()
        self._home: list[int] = home_E.tolist()
        self.rank_loads = [0.0] * num_ranks
        self._experts_of: list[list[int]] = [[] for _ in range(num_ranks)]  # with a copy there
        for expert, home in enumerate(self._home):
            self.rank_loads[home] += self._loads[expert]
            self._experts_of[home].append(expert)
        self._shares: dict[int, dict[int, float]] = {}  # load by rank, of experts with more than one copy
        self._tolerance = TOLERANCE * sum(self._loads) / num_ranks

    @property
    def highest_load(self) -> float:
        return max(self.rank_loads)

    @property
    def imbalance_ratio(self) -> float:
        total = sum(self.rank_loads)
        return self.highest_load * len(self.rank_loads) / total if total else 1.0

    @property
    def parts(self) -> Parts:
        pairs = [(expert, rank, load) for expert, share in self._shares.items() for rank, load in share.items()]
        pairs += [(expert, home, 1.0) for expert, home in enumerate(self._home) if expert not in self._shares]
        expert_N = np.array([expert for expert, _, _ in pairs], dtype=np.int64)
        rank_N = np.array([rank for _, rank, _ in pairs], dtype=np.int64)
        return Parts(expert_N, rank_N, np.array([self._part(expert, load) for expert, _, load in pairs]))

    def _part(self, expert: int, load: float) -> float:
        return load / self._loads[expert] if expert in self._shares and self._loads[expert] else 1.0

    def differing(self, other: Split) -> list[tuple[int, int, float]]:
        """(expert, rank, part here less part there) wherever the two split the same loads differently."""
        found = []
        for expert in self._shares.keys() | other._shares.keys():
            here, there = (dict(split.shares(expert)) for split in (self, other))
            if here != there:
                load = self._loads[expert] or 1.0
                ranks = sorted(here.keys() | there.keys())
                found += [(expert, rank, (here.get(rank, 0.0) - there.get(rank, 0.0)) / load) for rank in ranks]
        return found

    def copies(self) -> list[tuple[int, int]]:
        """(expert, rank) of every copy away from home, in order."""
        return [
            (expert, rank)
            for expert in sorted(self._shares)
            for rank in sorted(self._shares[expert])
            if rank != self._home[expert]
        ]

    def shares(self, expert: int) -> list[tuple[int, float]]:
        """(rank, load) of the expert over its copies, in order of rank."""
        return sorted(self._shares.get(expert, {self._home[expert]: self._loads[expert]}).items())

    def add(self, copies: Iterable[tuple[int, int]], sweeps: int = SWEEPS) -> None:
        """Add copies (expert, rank) where the expert is not yet, and split anew, with at most so many sweeps."""
        for expert, rank in copies:
            share = self._shares.setdefault(expert, {self._home[expert]: self._loads[expert]})
            assert rank not in share, f"expert {expert} is on rank {rank} already"
            share[rank] = 0.0
            self._experts_of[rank].append(expert)
        self._balance(sweeps)

    def drop(self, expert: int, rank: int) -> None:
        """Take a copy away from a rank that is not the expert's home, and split anew."""
        self._remove(expert, rank)
        self._balance()

    def with_copies(self, copies: Iterable[tuple[int, int]]) -> Split:
        """Another split, with these copies added, near enough to its best to be compared."""
        other = self._copied()
        other.add(copies, TRIAL_SWEEPS)
        return other

    def without(self, expert: int, rank: int) -> Split:
        """Another split, without this copy. Experts that share no rank with this one's copies stay as they are."""
        other = object.__new__(Split)
        other.__dict__.update(self.__dict__)
        other.rank_loads = list(self.rank_loads)
        other._experts_of = list(self._experts_of)
        other._experts_of[rank] = list(self._experts_of[rank])
        around = self._shares[expert].keys()
        near = [each for each, share in self._shares.items() if not share.keys().isdisjoint(around)]
        # Only what changes is copied: this is asked for every copy that is there.
        other._shares = {**self._shares, **{each: dict(self._shares[each]) for each in (*near, expert)}}
        other._remove(expert, rank)
        for _ in range(NEAR_SWEEPS):
            for each in near:
                other._level(each)
        return other

    def copies_for(self, level: float, room_R: Sequence[int], least_load: float) -> list[tuple[int, int]] | None:
        """New copies (expert, rank), at most room_R on each rank, with which no rank load is above `level`.

        Hottest ranks first, their hottest experts first, each to the rank with the most load to spare. None where
        that does not get there, or only with copies that carry less than least_load.
        """
        left = list(room_R)
        # Most to spare first, the lowest rank of those with as much.
        spare = [(load - level, rank) for rank, load in enumerate(self.rank_loads) if left[rank] > 0 and load < level]
        heapq.heapify(spare)
        new: list[tuple[int, int]] = []
        for source in sorted(range(len(left)), key=self.rank_loads.__getitem__, reverse=True):
            excess = self.rank_loads[source] - level
            if excess <= 0:
                break
            carried = {expert: self._carried(expert, source) for expert in self._experts_of[source]}
            for expert in sorted(carried, key=carried.__getitem__, reverse=True):
                movable, holders = carried[expert], set(self._shares.get(expert, (self._home[expert],)))
                passed = []  # ranks that hold the expert already
                while excess > 0 and movable > 0:
                    while spare and spare[0][1] in holders:
                        passed.append(heapq.heappop(spare))
                    minus_spare, rank = spare[0] if spare else (1.0, -1)
                    load = min(excess, movable, -minus_spare)
                    if load < min(least_load, excess):
                        break
                    new.append((expert, rank))
                    holders.add(rank)
                    excess -= load
                    movable -= load
                    left[rank] -= 1
                    if left[rank]:
                        heapq.heapreplace(spare, (minus_spare + load, rank))
                    else:
                        heapq.heappop(spare)
                for rank_to_spare in passed:
                    heapq.heappush(spare, rank_to_spare)
                if excess <= 0 or movable < least_load:
                    break
            if excess > TOLERANCE * level:
                return None
        # An expert that two hot ranks hold may have been sent to one rank by both.
        return sorted(set(new))

    def _carried(self, expert: int, rank: int) -> float:
        share = self._shares.get(expert)
        return self._loads[expert] if share is None else share[rank]

    def _copied(self) -> Split:
        other = object.__new__(Split)
        other.__dict__.update(self.__dict__)
        other.rank_loads = list(self.rank_loads)
        other._experts_of = [list(experts) for experts in self._experts_of]
        other._shares = {expert: dict(share) for expert, share in self._shares.items()}
        return other

    def _remove(self, expert: int, rank: int) -> None:
        assert rank != self._home[expert], f"rank {rank} is the home of expert {expert}"
        self.rank_loads[rank] -= self._shares[expert].pop(rank)
        self._experts_of[rank].remove(expert)
        self._level(expert)
        if len(self._shares[expert]) == 1:
            del self._shares[expert]

    def _balance(self, sweeps: int = SWEEPS) -> None:
        """Split every expert with copies over them, in turn, until nothing moves any more."""
        for _ in range(sweeps):
            if max((self._level(expert) for expert in self._shares), default=0.0) <= self._tolerance:
                return

    def _level(self, expert: int) -> float:
        """Split one expert over its copies, given the others, so that the lowest fill up first; the most that moved."""
        share = self._shares.get(expert)
        if share is None:
            return 0.0
        if len(share) == 2:
            return self._level_two(share, self._loads[expert])
        below = sorted((self.rank_loads[rank] - load, rank) for rank, load in share.items())
        height, poured = 0.0, self._loads[expert]
        for filled, (level, _) in enumerate(below, start=1):
            poured += level
            height = poured / filled
            if filled == len(below) or height <= below[filled][0]:
                break
        moved = 0.0
        for level, rank in below:
            load = max(height - level, 0.0)
            moved = max(moved, abs(load - share[rank]))
            share[rank] = load
            self.rank_loads[rank] = level + load
        return moved

    def _level_two(self, share: dict[int, float], load: float) -> float:
        """As _level does, of the most usual number of copies."""
        (first, of_first), (second, of_second) = share.items()
        rank_loads = self.rank_loads
        below_first, below_second = rank_loads[first] - of_first, rank_loads[second] - of_second
        to_first = min(max((load + below_second - below_first) / 2.0, 0.0), load)
        share[first], share[second] = to_first, load - to_first
        rank_loads[first], rank_loads[second] = below_first + to_first, below_second + load - to_first
        return abs(to_first - of_first)
