"""All that is counted of one engine, as rows of numbers; what happened in a window is the difference of two rows.

Shape letters: P phases of steps, S stages, R ranks, K links, D decisions, F phases of a layer, W fields of Worth,
L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from llep.messages import LAYER_PHASES, LINKS, STAGES, STEP_PHASES, Report, Worth
from llep.plan import Decision
from llep.scheduler.admit import Counters
from llep.scheduler.rings import Increments, Kept, Ring

Floats = npt.NDArray[np.float64]
AnyRing = TypeVar("AnyRing", bound=Kept)

WORTH_FIELDS = len(Worth.__struct_fields__)
# Of each rank, by step phase: seconds, seconds by layer phase, worth; memory used and free.
PER_RANK = len(STEP_PHASES) * (1 + len(LAYER_PHASES) + WORTH_FIELDS)
GAUGES = 2
DECISIONS = tuple(str(decision) for decision in Decision)

RANK_STEPS = ((1.0, 600), (10.0, 720), (60.0, 720))  # (seconds, rows): 10 minutes, 2 hours, 12 hours
# Windows of a second (20 of them), of decide_every_s (10 s: 4 minutes of them), and of a minute (half an hour).
EXPERT_SECONDS, EXPERT_ROWS, EXPERT_MINUTES = 21, 25, 31


class Columns:
    """Where in a row of an engine with ep_size ranks each count stands."""

    def __init__(self, ep_size: int) -> None:
        P, S, R = len(STEP_PHASES), len(STAGES), ep_size
        self._shapes: dict[str, tuple[int, ...]] = {
            "tokens_P": (P,),
            "layer_steps_P": (P,),
            "imbalance_sum_PS": (P, S),
            "routed_PR": (P, R),
            "computed_PR": (P, R),
            "lends_PK": (P, len(LINKS)),
            "lend_bytes_P": (P,),
            "spilled_tokens_P": (P,),
            "predicted_gain_s_P": (P,),
            "decisions_PD": (P, len(DECISIONS)),
            # Means over ranks.
            "layer_seconds_P": (P,),
            "phase_seconds_PF": (P, len(LAYER_PHASES)),
            "worth_PW": (P, WORTH_FIELDS),
            # Gauges: they don't grow, and their difference says nothing.
            "memory_used_R": (R,),
            "memory_free_R": (R,),
        }
        self._slices: dict[str, slice] = {}
        start = 0
        for name, shape in self._shapes.items():
            self._slices[name] = slice(start, start + prod(shape))
            start += prod(shape)
        self.width = start

    def read(self, row: Floats, name: str) -> Floats:
        """One count in rows [..., width] by its name, in its own shape."""
        return row[..., self._slices[name]].reshape(*row.shape[:-1], *self._shapes[name])

    def row(self, report: Report, found: Counters, per_rank_RX: Floats, heard: list[int]) -> Floats:
        """The row of rank 0's report, with what the ranks heard so far last said of their own time and memory."""
        group = report.group
        assert group is not None
        arrays = found.arrays
        lends_PK = arrays["lends_in_PRK"].sum(axis=1)
        seconds_X = per_rank_RX[heard, :PER_RANK].mean(axis=0)
        return np.concatenate(
            [
                arrays["tokens_PL"].max(axis=1),
                arrays["layer_steps_PL"].sum(axis=1),
                arrays["imbalance_sum_PLS"].sum(axis=1).reshape(-1),
                arrays["routed_PLR"].sum(axis=1).reshape(-1),
                arrays["computed_PLR"].sum(axis=1).reshape(-1),
                lends_PK.reshape(-1),
                lends_PK.sum(axis=1) * float(group.bytes_per_lend),
                arrays["spilled_in_PR"].sum(axis=1),
                [group.predicted_gain_s.get(phase, 0.0) for phase in STEP_PHASES],
                [group.decisions.get(phase, {}).get(name, 0) for phase in STEP_PHASES for name in DECISIONS],
                seconds_X,
                per_rank_RX[:, PER_RANK:].T.reshape(-1),
            ]
        )


def per_rank(report: Report) -> list[float]:
    """What a rank says of its own time and memory: PER_RANK + GAUGES numbers."""
    nothing = Worth()
    seconds_by_step = (report.phase_seconds.get(step, {}) for step in STEP_PHASES)
    return [
        *(report.layer_seconds.get(phase, 0.0) for phase in STEP_PHASES),
        *(each[phase].sum if phase in each else 0.0 for each in seconds_by_step for phase in LAYER_PHASES),
        *(value for phase in STEP_PHASES for value in msgspec.structs.astuple(report.worth.get(phase, nothing))),
        report.memory_used_bytes,
        report.device_free_bytes,
    ]


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two rows. `times` are monotonic seconds of both."""

    columns: Columns
    from_s: float
    to_s: float
    _difference: Floats

    @property
    def seconds(self) -> float:
        return self.to_s - self.from_s

    def sum(self, name: str) -> Floats:
        return self.columns.read(self._difference, name)

    def total(self, name: str) -> float:
        return float(self.sum(name).sum())


class Totals:
    """The rows of one engine: ranks at RANK_STEPS, every expert of every layer by the second, expert_step_s, minute."""

    def __init__(self, ep_size: int, num_layers: int, num_experts: int, expert_step_s: float = 10.0) -> None:
        self.expert_step_s = expert_step_s
        self.columns = Columns(ep_size)
        self.newest_s = -np.inf
        self.newest = np.zeros(self.columns.width)
        self._rings = [Ring(step_s, rows, self.columns.width) for step_s, rows in RANK_STEPS]
        P, L, R, E = len(STEP_PHASES), num_layers, ep_size, num_experts
        self._shape_PLE, self._shape_PLR = (P, L, E), (P, L, R)
        # Modulo 2^32: the difference of two rows is right all the same, up to 4 billion pairs of one expert.
        width = P * L * (E + R + 1)
        self._expert_steps = Ring(expert_step_s, EXPERT_ROWS, width, np.uint32)
        self._expert_rings: list[Kept] = [
            Increments(1.0, EXPERT_SECONDS, width, np.uint32),
            self._expert_steps,
            Ring(60.0, EXPERT_MINUTES, width, np.uint32),
        ]
        self.newest_experts: npt.NDArray[np.uint32] = np.zeros(width, dtype=np.uint32)

    @property
    def most_bytes(self) -> int:
        """What it takes when all rows are there."""
        return sum(kept.most_bytes for kept in (*self._rings, *self._expert_rings))

    @property
    def is_empty(self) -> bool:
        return not len(self._rings[0])

    def begin(self, time_s: float) -> None:
        """Nothing was counted at that time."""
        self._put(time_s, self.newest, self.newest_experts)

    def put(self, time_s: float, row: Floats, found: Counters) -> bool:
        """Take the newest counts. Whether a new step of the experts' has begun."""
        arrays = found.arrays
        experts = np.concatenate(
            [arrays["routed_PLE"].reshape(-1), arrays["computed_PLR"].reshape(-1), arrays["lends_PL"].reshape(-1)],
            dtype=np.uint32,
            casting="unsafe",
        )
        self.newest, self.newest_experts, self.newest_s = row, experts, time_s
        is_new = self._expert_steps.wants(time_s)
        self._put(time_s, row, experts)
        return is_new

    def _put(self, time_s: float, row: Floats, experts: npt.NDArray[np.uint32]) -> None:
        for ring in self._rings:
            if ring.wants(time_s):
                ring.put(time_s, row)
        for kept in self._expert_rings:
            if kept.wants(time_s):
                kept.put(time_s, experts)

    def window(self, window_s: float) -> Window:
        """The newest row less the one window_s before it, or what there is of it."""
        from_s, base = _ring_for(self._rings, self.newest_s - window_s).at(self.newest_s - window_s)
        return Window(self.columns, from_s, self.newest_s, self.newest - base)

    def series(self, window_s: float, step_s: float) -> tuple[Floats, Floats]:
        """(times, rows) at about every step_s over the window; the newest last, and the one before the window first."""
        start_s = self.newest_s - window_s
        fitting = [ring for ring in self._rings if ring.step_s <= step_s] or self._rings[:1]
        ring = _ring_for(fitting, start_s)
        times, rows = np.append(ring.times, self.newest_s), np.vstack([ring.rows, self.newest])
        steps = np.floor((times - self.newest_s) / max(step_s, ring.step_s) + 1e-6)
        is_last = np.append(np.diff(steps) > 0, True)
        is_wanted = is_last & ((times >= start_s) | (np.append(times[1:], np.inf) > start_s))
        found: Floats = rows[is_wanted]
        return times[is_wanted], found

    def experts(
        self, window_s: float
    ) -> tuple[float, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(seconds covered, routed_PLE, computed_PLR, lends_PL) of the window, or what there is of it."""
        start_s = self.newest_s - window_s
        from_s, base = _ring_for(self._expert_rings, start_s).at(start_s)
        return (self.newest_s - from_s, *self._parts(self.newest_experts - base))

    def routed(self, window_s: float) -> npt.NDArray[np.uint32]:
        """Pairs routed [L, E] in the window, both phases: less work than `experts`."""
        size = prod(self._shape_PLE)
        _, base = _ring_for(self._expert_rings, self.newest_s - window_s).at(self.newest_s - window_s)
        routed_PLE = (self.newest_experts[:size] - base[:size]).reshape(self._shape_PLE)
        routed_LE: npt.NDArray[np.uint32] = routed_PLE.sum(axis=0, dtype=np.uint32)
        return routed_LE

    def routed_windows(self) -> tuple[Floats, Floats]:
        """(times [N + 1], pairs routed [N, L, E], both phases) of the expert_step_s that are kept, the oldest first."""
        ring = self._expert_steps
        size = int(np.prod(self._shape_PLE))
        rows = ring.rows[:, :size]
        routed_NPLE = np.diff(rows, axis=0).reshape(-1, *self._shape_PLE)
        return ring.times, routed_NPLE.sum(axis=1, dtype=np.float64)

    def _parts(
        self, row: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        sizes = [int(np.prod(self._shape_PLE)), int(np.prod(self._shape_PLR))]
        routed, computed, lends = np.split(row.astype(np.int64), np.cumsum(sizes))
        return routed.reshape(self._shape_PLE), computed.reshape(self._shape_PLR), lends.reshape(self._shape_PLE[:2])


def _ring_for(rings: Sequence[AnyRing], start_s: float) -> AnyRing:
    """The finest that goes back so far, else the one that goes back furthest."""
    reaching = [ring for ring in rings if ring.reaches(start_s)]
    return reaching[0] if reaching else rings[-1]


def empty_window(ep_size: int, now_s: float) -> Window:
    columns = Columns(ep_size)
    nothing = np.zeros(columns.width)
    return Window(columns, now_s, now_s, nothing)
