"""The best split of one layer's expert loads over the copies it has, and what further copies would do.

Splitting so that the sum of squared rank loads is least also makes the highest rank load least; it is reached by
splitting one expert after the other over its copies, again and again. Plain numbers and dicts: experts have few copies.

Shape letters: E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from operator import itemgetter
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
    """The part of an expert's load that a rank carries, 1 together for each expert; or by how much it differs."""

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
        # Worked out since the last change:
        self._ranks: list[int] | None = None
        self._experts: dict[int, list[tuple[float, int]]] = {}
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

    def differing(self, other: Split) -> Parts:
        """What ranks carry here less what they carry there, wherever the two split the same loads differently."""
        expert_N, rank_N, part_N = [], [], []
        for expert in self._shares.keys() | other._shares.keys():
            if self._shares.get(expert) is other._shares.get(expert):
                continue  # `without` copies only what it changes
            more = dict(self.shares(expert))
            for rank, load in other.shares(expert):
                more[rank] = more.get(rank, 0.0) - load
            whole = self._loads[expert] or 1.0
            for rank, load in more.items():
                if load:
                    expert_N.append(expert)
                    rank_N.append(rank)
                    part_N.append(load / whole)
        return Parts(np.array(expert_N, dtype=np.int64), np.array(rank_N, dtype=np.int64), np.array(part_N))

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
            self._experts_of[rank] = [*self._experts_of[rank], expert]
        self._balance(sweeps)

    def drop(self, expert: int, rank: int) -> None:
        """Take a copy away from a rank that is not the expert's home, and split anew."""
        self._remove(expert, rank)
        self._balance()

    def with_copies(self, copies: Iterable[tuple[int, int]]) -> Split:
        """Another split, with these copies added, near enough to its best to be compared."""
        other = self._copied()
        other._shares = {expert: dict(share) for expert, share in self._shares.items()}
        other.add(copies, TRIAL_SWEEPS)
        return other

    def without(self, expert: int, rank: int) -> Split:
        """Another split, without this copy. Experts that share no rank with this one's copies stay as they are."""
        other = self._copied()
        near = self.near(expert)
        # Only what changes is copied: this is asked for every copy that is there.
        other._shares = {**self._shares, **{each: dict(self._shares[each]) for each in near}}
        other._remove(expert, rank)
        for _ in range(NEAR_SWEEPS):
            for each in near:
                if share := other._shares.get(each):
                    other._level(share, other._loads[each])
        return other

    def near(self, expert: int) -> list[int]:
        """The experts with copies that share a rank with this one's copies, itself among them."""
        around = self._shares[expert].keys()
        return [each for each, share in self._shares.items() if not share.keys().isdisjoint(around)]

    def copies_for(self, level: float, room_R: Sequence[int], least_load: float) -> list[tuple[int, int]] | None:
        """New copies (expert, rank), at most room_R on each rank, with which no rank load is above `level`.

        Hottest ranks first, their hottest experts first, each to the rank with the most load to spare. None where
        that does not get there, or only with copies that carry less than least_load.
        """
        left = list(room_R)
        # Most to spare first, the lowest rank of those with as much.
        spare = [(load - level, rank) for rank, load in enumerate(self.rank_loads) if load < level and left[rank] > 0]
        heapq.heapify(spare)
        new: list[tuple[int, int]] = []
        for source in self._hottest_ranks():
            excess = self.rank_loads[source] - level
            if excess <= 0:
                break
            for movable, expert in self._hottest_experts(source):
                if movable < min(least_load, excess):
                    break
                holders = self._shares.get(expert, ())
                passed = []  # ranks that hold the expert already
                while excess > 0 and movable > 0:
                    while spare and spare[0][1] in holders:
                        passed.append(heapq.heappop(spare))
                    minus_spare, rank = spare[0] if spare else (0.0, -1)
                    load = min(excess, movable, -minus_spare)
                    if load <= 0 or load < min(least_load, excess):
                        break
                    new.append((expert, rank))
                    excess -= load
                    movable -= load
                    left[rank] -= 1
                    if left[rank] and minus_spare + load < 0:
                        heapq.heapreplace(spare, (minus_spare + load, rank))
                    else:
                        heapq.heappop(spare)
                for rank_to_spare in passed:
                    heapq.heappush(spare, rank_to_spare)
                if excess <= 0:
                    break
            if excess > TOLERANCE * level:
                return None
        # An expert that two hot ranks hold may have been sent to one rank by both.
        return sorted(set(new))

    def _hottest_ranks(self) -> list[int]:
        if self._ranks is None:
            self._ranks = sorted(range(len(self.rank_loads)), key=self.rank_loads.__getitem__, reverse=True)
        return self._ranks

    def _hottest_experts(self, rank: int) -> list[tuple[float, int]]:
        """(load, expert) of what the rank carries, most first."""
        found = self._experts.get(rank)
        if found is None:
            carried = [(self._carried(expert, rank), expert) for expert in self._experts_of[rank]]
            found = self._experts[rank] = sorted(carried, key=itemgetter(0), reverse=True)
        return found

    def _carried(self, expert: int, rank: int) -> float:
        share = self._shares.get(expert)
        return self._loads[expert] if share is None else share[rank]

    def _copied(self) -> Split:
        """Another split of which only the shares of experts are not its own yet."""
        other = object.__new__(Split)
        other.__dict__.update(self.__dict__)
        other.rank_loads = list(self.rank_loads)
        other._experts_of = list(self._experts_of)
        other._forget()
        return other

    def _remove(self, expert: int, rank: int) -> None:
        assert rank != self._home[expert], f"rank {rank} is the home of expert {expert}"
        self.rank_loads[rank] -= self._shares[expert].pop(rank)
        self._experts_of[rank] = [each for each in self._experts_of[rank] if each != expert]
        self._level(self._shares[expert], self._loads[expert])
        if len(self._shares[expert]) == 1:
            del self._shares[expert]

    def _balance(self, sweeps: int = SWEEPS) -> None:
        """Split every expert with copies over them, in turn, until nothing moves any more."""
        self._forget()
        shares, loads = self._shares, self._loads
        for _ in range(sweeps):
            most = 0.0
            for expert, share in shares.items():
                moved = self._level(share, loads[expert])
                if moved > most:
                    most = moved
            if most <= self._tolerance:
                return

    def _forget(self) -> None:
        self._ranks = None
        self._experts = {}

    def _level(self, share: dict[int, float], whole: float) -> float:
        """Split one expert over its copies, given the others, so that the lowest fill up first; the most that moved."""
        rank_loads = self.rank_loads
        if len(share) == 2:  # as below, of the most usual number of copies
            (first, of_first), (second, of_second) = share.items()
            below_first, below_second = rank_loads[first] - of_first, rank_loads[second] - of_second
            to_first = (whole + below_second - below_first) / 2.0
            to_first = 0.0 if to_first < 0.0 else whole if to_first > whole else to_first
            share[first], share[second] = to_first, whole - to_first
            rank_loads[first], rank_loads[second] = below_first + to_first, below_second + whole - to_first
            return abs(to_first - of_first)
        below = [(rank_loads[rank] - load, rank) for rank, load in share.items()]
        height = (sum([level for level, _ in below]) + whole) / len(below)
        if height < max(below)[0]:  # not all of them fill up: the lowest do
            below.sort()
            poured = whole
            for filled, (level, _) in enumerate(below, start=1):
                poured += level
                height = poured / filled
                if filled == len(below) or height <= below[filled][0]:
                    break
        most = 0.0
        for level, rank in below:
            load = height - level if height > level else 0.0
            moved = abs(load - share[rank])
            if moved > most:
                most = moved
            share[rank] = load
            rank_loads[rank] = level + load
        return most
