"""The best split of one layer's expert loads over the copies it has, and what further copies would do.

Splitting so that the sum of squared rank loads is least also makes the highest rank load least; it is reached by
splitting one expert after the other over its copies, again and again.

Shape letters: E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SWEEPS = 100
LOSS_SWEEPS = 3
TOLERANCE = 1e-6  # of the mean rank load


class Split:
    """Loads of experts over their copies: at home, and on the ranks they were added to. Loads are never negative."""

    def __init__(self, loads_E: Floats, home_E: Ids, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._loads_E, self._home_E = loads_E, home_E
        self._carried_ER = np.zeros((len(loads_E), num_ranks))
        self._carried_ER[np.arange(len(loads_E)), home_E] = loads_E
        self._has_ER = np.zeros((len(loads_E), num_ranks), dtype=bool)
        self._has_ER[np.arange(len(loads_E)), home_E] = True
        self._ranks_of: dict[int, Ids] = {}  # experts with more than one copy
        self.rank_loads_R = self._carried_ER.sum(axis=0)

    @property
    def highest_load(self) -> float:
        return float(self.rank_loads_R.max())

    @property
    def imbalance_ratio(self) -> float:
        mean = float(self.rank_loads_R.mean())
        return self.highest_load / mean if mean else 1.0

    def copies(self) -> list[tuple[int, int]]:
        """(expert, rank) of every copy away from home, in order."""
        return [
            (expert, int(rank))
            for expert in sorted(self._ranks_of)
            for rank in self._ranks_of[expert]
            if rank != self._home_E[expert]
        ]

    def shares(self, expert: int) -> list[tuple[int, float]]:
        """(rank, load) of the expert over its copies, in order of rank."""
        ranks = self._ranks_of.get(expert, self._home_E[[expert]])
        return [(int(rank), float(self._carried_ER[expert, rank])) for rank in ranks]

    def add(self, copies: Iterable[tuple[int, int]]) -> None:
        """Add copies (expert, rank) where the expert is not yet, and split anew."""
        for expert, rank in copies:
            assert not self._has_ER[expert, rank], f"expert {expert} is on rank {rank} already"
            self._has_ER[expert, rank] = True
            self._ranks_of[expert] = np.flatnonzero(self._has_ER[expert])
        self._balance()

    def drop(self, expert: int, rank: int) -> None:
        """Take a copy away from a rank that is not the expert's home, and split anew."""
        assert rank != self._home_E[expert], f"rank {rank} is the home of expert {expert}"
        self._has_ER[expert, rank] = False
        ranks = np.flatnonzero(self._has_ER[expert])
        self._fill(expert, ranks)
        if len(ranks) > 1:
            self._ranks_of[expert] = ranks
        else:
            del self._ranks_of[expert]
        self._balance()

    def loss_without(self, expert: int, rank: int) -> float:
        """By how much the highest load would grow without this copy, at most: experts further away stay as they are."""
        carried_ER, loads_R = self._carried_ER.copy(), self.rank_loads_R.copy()
        highest = self.highest_load
        around = self._ranks_of[expert]
        left = around[around != rank]
        near = {
            other: ranks for other, ranks in self._ranks_of.items() if other != expert and self._meets(ranks, around)
        }
        self._fill(expert, left)
        for _ in range(LOSS_SWEEPS):
            for other, ranks in near.items():
                self._fill(other, ranks)
            self._fill(expert, left)
        loss = max(self.highest_load - highest, 0.0)
        self._carried_ER, self.rank_loads_R = carried_ER, loads_R
        return loss

    def _meets(self, ranks: Ids, others: Ids) -> bool:
        return not set(ranks.tolist()).isdisjoint(others.tolist())

    def parts_of_highest(self) -> Floats:
        """The part [E], 0 to 1, of each expert's load that the rank with the highest load carries."""
        rank = int(self.rank_loads_R.argmax())
        parts_E: Floats = self._carried_ER[:, rank] / np.maximum(self._loads_E, 1e-300)
        return parts_E

    def copies_for(self, level: float, room_R: Ids, least_load: float) -> list[tuple[int, int]] | None:
        """New copies (expert, rank), at most room_R on each rank, with which no rank load is above `level`.

        Hottest ranks first, their hottest experts first, each to the rank with the most load to spare. None where
        that does not get there, or only with copies that carry less than least_load.
        """
        loads_R, left_R = self.rank_loads_R.copy(), room_R.copy()
        spare_R = np.where(left_R > 0, level - loads_R, -np.inf)
        new: set[tuple[int, int]] = set()
        for source in np.argsort(-loads_R, kind="stable"):
            excess = loads_R[source] - level
            for expert in np.argsort(-self._carried_ER[:, source], kind="stable") if excess > 0 else ():
                movable = self._carried_ER[expert, source]
                spare_of_R = np.where(self._has_ER[expert], -np.inf, spare_R)
                while excess > 0 and movable > 0:
                    rank = int(spare_of_R.argmax())
                    load = min(excess, movable, spare_of_R[rank])
                    if load < min(least_load, excess):
                        break
                    new.add((int(expert), rank))
                    excess -= load
                    movable -= load
                    left_R[rank] -= 1
                    spare_R[rank] = spare_R[rank] - load if left_R[rank] > 0 else -np.inf
                    spare_of_R[rank] = -np.inf
                if excess <= 0 or movable < least_load:
                    break
            if excess > TOLERANCE * level:
                return None
        return sorted(new)

    def _balance(self) -> None:
        """Split every expert with copies over them, in turn, until nothing moves any more."""
        tolerance = TOLERANCE * float(self.rank_loads_R.mean())
        for _ in range(SWEEPS):
            if max((self._fill(expert, ranks) for expert, ranks in self._ranks_of.items()), default=0.0) <= tolerance:
                return

    def _fill(self, expert: int, ranks: Ids) -> float:
        """Split one expert over these ranks, given the others; the most load that moved."""
        before_R = self._carried_ER[expert].copy()
        self.rank_loads_R -= before_R
        self._carried_ER[expert] = 0.0
        self._carried_ER[expert, ranks] = _fill_up(self.rank_loads_R[ranks], float(self._loads_E[expert]))
        self.rank_loads_R += self._carried_ER[expert]
        return float(np.abs(self._carried_ER[expert] - before_R).max())


def _fill_up(levels: Floats, load: float) -> Floats:
    """Shares of the load that make the levels as even as adding can."""
    order = np.sort(levels)
    # The k lowest, filled up, come to (load + their sum) / k; k are filled as long as that is above the k-th.
    heights = (load + np.cumsum(order)) / np.arange(1, len(order) + 1)
    count = int((heights > order).sum())
    shares: Floats = np.maximum(heights[max(count, 1) - 1] - levels, 0.0)
    return shares
