"""Rows of cumulative counts at fixed steps of time, in bounded memory: any window is the difference of two rows."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]

MOST_BYTES = 32 << 20  # of one ring
FEWEST_ROWS = 2


class Kept(Protocol):
    """Rows of the past, at steps of time."""

    step_s: float
    most_bytes: int  # when all rows are there

    def __len__(self) -> int: ...

    def wants(self, time_s: float) -> bool:
        """Whether a row of that time would be the first of its step."""
        ...

    def put(self, time_s: float, row: Rows) -> None:
        """Keep a row, later than all before it."""
        ...

    def reaches(self, time_s: float) -> bool:
        """Whether a row that old is kept, or the first there ever was."""
        ...

    def at(self, time_s: float) -> tuple[float, Rows]:
        """(time, row): the newest not later than that time, else the oldest kept."""
        ...


class Increments:
    """A Ring of unsigned counts that keeps of each row what it adds to the one before, in as few bytes as that needs:
    short steps add little. A row is had by taking off what came later, so the newest are the cheapest.
    """

    def __init__(self, step_s: float, capacity: int, width: int, dtype: type[np.unsignedinteger[Any]]) -> None:
        self.step_s = step_s
        capacity = _most_rows(capacity, width, dtype)
        self.most_bytes = capacity * width * np.dtype(dtype).itemsize
        self._times: deque[float] = deque(maxlen=capacity)
        self._added: deque[Rows] = deque(maxlen=capacity - 1)  # by each row but the oldest
        self._newest: Rows = np.zeros(width, dtype=dtype)
        self._has_first = True

    def __len__(self) -> int:
        return len(self._times)

    def wants(self, time_s: float) -> bool:
        return not self._times or time_s // self.step_s > self._times[-1] // self.step_s

    def put(self, time_s: float, row: Rows) -> None:
        self._has_first &= len(self._times) < (self._times.maxlen or 0)
        if self._times:
            added = row - self._newest  # modulo what the counts are modulo of
            self._added.append(added.astype(np.min_scalar_type(added.max(initial=0))))
        self._times.append(time_s)
        self._newest = row

    def reaches(self, time_s: float) -> bool:
        return bool(self._times) and (self._has_first or self._times[0] <= time_s)

    def at(self, time_s: float) -> tuple[float, Rows]:
        place, row = len(self._times) - 1, self._newest.copy()
        while place and self._times[place] > time_s:
            row -= self._added[place - 1]
            place -= 1
        return self._times[place], row


class Ring:
    """The first row of every step of time, the last `capacity` of them. Memory is taken as rows come."""

    def __init__(self, step_s: float, capacity: int, width: int, dtype: type[np.generic] = np.float64) -> None:
        self.step_s = step_s
        capacity = _most_rows(capacity, width, dtype)
        self._times = np.zeros(capacity)
        self._rows: Rows = np.zeros((capacity, width), dtype=dtype)  # untouched pages take no memory
        self.most_bytes = self._rows.nbytes
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, len(self._times))

    def wants(self, time_s: float) -> bool:
        return not self._count or time_s // self.step_s > self._newest_s // self.step_s

    def put(self, time_s: float, row: Rows) -> None:
        at = self._count % len(self._times)
        self._times[at] = time_s
        self._rows[at] = row
        self._count += 1

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """Of the rows that are kept, oldest first."""
        return self._times[self._order()]

    @property
    def rows(self) -> Rows:
        """A copy of all rows that are kept, oldest first."""
        found: Rows = self._rows[self._order()]
        return found

    def reaches(self, time_s: float) -> bool:
        return bool(self._count) and (self._count <= len(self._times) or self.times[0] <= time_s)

    def at(self, time_s: float) -> tuple[float, Rows]:
        times = self.times
        place = max(int(np.searchsorted(times, time_s, side="right")) - 1, 0)
        at = self._order()[place]
        return float(self._times[at]), self._rows[at]

    @property
    def _newest_s(self) -> float:
        return float(self._times[(self._count - 1) % len(self._times)])

    def _order(self) -> npt.NDArray[np.int64]:
        length = len(self)
        return (np.arange(length) + (self._count - length)) % len(self._times)


def _most_rows(wanted: int, width: int, dtype: type[np.generic]) -> int:
    """An engine of absurd size gets a shorter memory, not more of it."""
    return max(min(wanted, MOST_BYTES // (width * np.dtype(dtype).itemsize)), FEWEST_ROWS)
