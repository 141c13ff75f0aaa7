"""llep's own placement planner: which experts get resident replicas, on which ranks, within a byte budget per rank.

Loads come as windows and are kept as a forecast (`Forecast`: mean and spread). A layer's next copies are those that
lower its highest rank load most per byte; layers compete for each rank's bytes, which makes it a knapsack over layers.
Present copies stay unless their bytes are worth much more elsewhere, and what could be noise moves nothing.

Shape letters: L layers (positions, not the model's numbers), E experts, R ranks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llep.planning.split import Parts, Split

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SMOOTHINGS = (0.1, 0.3, 0.6)
GAIN_SMOOTHING = 0.3
FORGOTTEN = 3.0  # over smoothing: age in windows at which a window has lost 95% of its weight and is dropped
SETTLED = 4  # windows that must agree among themselves before and after a change at once
CHANGED = 16.0  # squared distance of the mean shares of before and after, over the windows' own spread; even drift: 9.6
SMALLEST_CHANGE = 1e-3  # distance of shares below which nothing is a change
PAST_BEST = 0.25  # of the best wish per copy: when one is worth less, lower levels are not tried
TRIALS = 3  # most steps that are tried on the windows before a layer is left alone
LEVELS = 12  # rank loads that are tried between the present highest and the mean


class Replica(NamedTuple):
    """A resident copy of an expert away from its home rank. layer is a position, 0 for the first MoE layer."""

    layer: int
    expert: int
    rank: int


@dataclass(frozen=True)
class Forecast:
    """What the last windows say about each expert's share of its layer's pairs: an exponentially weighted mean, and how
    far it may be off.

    Shares, not tokens: that there is more traffic at noon says nothing about who is popular. A window without tokens
    in a layer says nothing about it, nor do those before its loads last changed at once. The windows themselves are
    kept, because experts of one rank may well be popular at the same time, and only windows show that.
    """

    share_WLE: Floats  # the newest window last
    pairs_WL: Floats
    smoothing: float | None

    @classmethod
    def start(cls, num_layers: int, num_experts: int, smoothing: float | None = None) -> Forecast:
        """Before the first window.

        smoothing is the newest window's weight, and raising it forgets faster; None takes for each layer the one of
        SMOOTHINGS that would have foretold the windows so far best: little where there is noise, much under drift.
        """
        if smoothing is not None and not 0.0 < smoothing < 1.0:
            raise ValueError(f"smoothing must be above 0 and below 1, got {smoothing}")
        return cls(np.zeros((0, num_layers, num_experts)), np.zeros((0, num_layers)), smoothing)

    def seen(self, loads_LE: npt.NDArray[np.int64] | Floats) -> Forecast:
        """The forecast after one more window. ValueError for loads of another shape, negative or not finite."""
        loads_LE = np.asarray(loads_LE, dtype=np.float64)
        if loads_LE.shape != self.share_WLE.shape[1:]:
            raise ValueError(
                f"loads must have shape {self.share_WLE.shape[1:]} as the windows before, got {loads_LE.shape}"
            )
        if not (np.isfinite(loads_LE).all() and (loads_LE >= 0).all()):
            raise ValueError("loads must be finite and >= 0")
        pairs_L = loads_LE.sum(axis=1)
        share_LE: Floats = loads_LE / np.maximum(pairs_L, 1e-300)[:, None]
        kept = math.ceil(FORGOTTEN / (self.smoothing or SMOOTHINGS[0])) - 1
        return Forecast(
            np.concatenate([self.share_WLE[-kept:], share_LE[None]]),
            np.concatenate([self.pairs_WL[-kept:], pairs_L[None]]),
            self.smoothing,
        )

    def windows(self, layer: int) -> int:
        """Windows that say something about this layer."""
        return int(self.says_WL[:, layer].sum())

    @property
    def changed_windows_ago(self) -> int | None:
        """How many windows have passed since a layer's loads last changed at once; None where none did."""
        changed_L = (~self.says_WL & (self.pairs_WL > 0)).any(axis=0)
        return int(self.says_WL.sum(axis=0)[changed_L].min()) if changed_L.any() else None

    def share(self, layer: int) -> Floats:
        """Mean share [E] of each expert; zeros before the first window."""
        share_E: Floats = self._weights(layer) @ self.share_WLE[:, layer]
        return share_E

    def pairs(self, layer: int) -> float:
        """Mean pairs of a window."""
        return float(self._weights(layer) @ self.pairs_WL[:, layer])

    def rank_loads(self, layer: int, parts: Parts, num_ranks: int) -> Floats:
        """Load of each rank in each window [W, R], as a share of the layer's pairs."""
        share_WE = self.share_WLE[:, layer]
        # Not by a matrix product: its threads would fight for cores that serving needs.
        cell_WN = np.arange(len(share_WE))[:, None] * num_ranks + parts.rank_N
        loads_WN = share_WE[:, parts.expert_N] * parts.part_N
        loads = np.bincount(cell_WN.reshape(-1), loads_WN.reshape(-1), len(share_WE) * num_ranks)
        return np.asarray(loads.reshape(-1, num_ranks), dtype=np.float64)

    def gain_weights(self, layer: int) -> Floats:
        """Weight [W] of each window where gains are reckoned, 1 together."""
        # Forgetting faster than GAIN_SMOOTHING would leave too few windows to tell what is chance.
        return self._weights(layer, min(float(self.smoothing_L[layer]), GAIN_SMOOTHING))

    def gain(self, layer: int, loads_WR: Floats, new_loads_WR: Floats) -> tuple[float, float]:
        """By how much the windows' highest rank load would have been lower, as a share, and the standard error of that.

        Loads as from `rank_loads`, now and anew. What helped in a few windows only has a large error; with one window
        it is infinite.
        """
        weights_W = self.gain_weights(layer)
        squares = float((weights_W**2).sum())
        before_W = loads_WR.max(axis=1)
        gain_W = before_W - new_loads_WR.max(axis=1)
        mean, highest = float(weights_W @ gain_W), float(weights_W @ before_W)
        others = 1.0 / squares - 1.0  # windows' worth besides one: so much is known about the spread
        if others < 0.5:
            return mean, math.inf
        seen = float(weights_W @ (gain_W - mean) ** 2) / (1.0 - squares)
        drawn = highest * max(1.0 - highest, 0.0) / max(self.pairs(layer), 1.0)
        return mean, math.sqrt(max(seen, drawn) * squares) * (1.0 + 1.0 / others)

    @cached_property
    def says_WL(self) -> npt.NDArray[np.bool_]:
        """Whether a window says something about a layer: it has tokens, and no change at once came after it."""
        is_late_WL = np.arange(len(self.pairs_WL))[:, None] >= self.first_L
        return np.asarray(is_late_WL & (self.pairs_WL > 0))

    @cached_property
    def first_L(self) -> Ids:
        """The first window after each layer's loads last changed at once; 0 where they did not.

        A change came where SETTLED windows and all that followed differ in their mean shares by far more than they do
        among themselves. So neither a burst, noise nor drift is one; nor is hot spots' coming and going.
        """
        num_windows, num_layers, num_experts = self.share_WLE.shape
        first_L = np.zeros(num_layers, dtype=np.int64)
        sums_LE = np.concatenate([np.zeros((1, num_layers, num_experts)), self.share_WLE.cumsum(axis=0)])
        squares_L = np.concatenate([np.zeros((1, num_layers)), (self.share_WLE**2).sum(axis=2).cumsum(axis=0)])

        def mean_and_spread(first: int, end: int) -> tuple[Floats, Floats]:
            count = end - first
            mean_LE = (sums_LE[end] - sums_LE[first]) / count
            return mean_LE, (squares_L[end] - squares_L[first] - count * (mean_LE**2).sum(axis=1)) / (count - 1)

        for change in range(SETTLED, num_windows - SETTLED + 1):
            old_LE, old_spread_L = mean_and_spread(change - SETTLED, change)
            new_LE, new_spread_L = mean_and_spread(change, num_windows)
            distance_L = ((new_LE - old_LE) ** 2).sum(axis=1)
            is_change_L = distance_L > np.maximum(CHANGED * np.maximum(old_spread_L, new_spread_L), SMALLEST_CHANGE**2)
            has_tokens_L = (self.pairs_WL[change - SETTLED :] > 0).all(axis=0)
            first_L = np.where(is_change_L & has_tokens_L, change, first_L)
        return first_L

    @cached_property
    def smoothing_L(self) -> Floats:
        """The smoothing of each layer."""
        if self.smoothing is not None:
            return np.full(self.pairs_WL.shape[1], self.smoothing)
        errors = np.array([self._errors(smoothing) for smoothing in SMOOTHINGS])
        # Less smoothing must foretell clearly better: the errors are noisy too.
        errors *= np.array([1.0, 1.05, 1.1])[:, None]
        return np.asarray(np.array(SMOOTHINGS)[errors.argmin(axis=0)], dtype=np.float64)

    def _errors(self, smoothing: float) -> Floats:
        """Sum of squared errors [L] had each window been foretold from those before it."""
        errors_L = np.zeros(self.pairs_WL.shape[1])
        mean_LE, weight_L = np.zeros(self.share_WLE.shape[1:]), np.zeros(len(errors_L))
        for window, (share_LE, pairs_L) in enumerate(zip(self.share_WLE, self.pairs_WL, strict=True)):
            weight_L = np.where(self.first_L == window, 0.0, weight_L)  # a change at once can't be foretold
            off_LE = share_LE - mean_LE
            has_tokens_L = pairs_L > 0
            errors_L += np.where(has_tokens_L & (weight_L > 0), (off_LE**2).sum(axis=1), 0.0)
            weight_L = np.where(has_tokens_L, (1.0 - smoothing) * weight_L + 1.0, weight_L)
            mean_LE = mean_LE + np.where(has_tokens_L, 1.0 / np.maximum(weight_L, 1.0), 0.0)[:, None] * off_LE
        return errors_L

    def _weights(self, layer: int, smoothing: float | None = None) -> Floats:
        """Weight [W] of each window, 1 together; by default with the layer's smoothing."""
        age_W = np.arange(len(self.pairs_WL))[::-1]
        weights_W = (1.0 - (smoothing or self.smoothing_L[layer])) ** age_W * self.says_WL[:, layer]
        return np.asarray(weights_W / max(float(weights_W.sum()), 1e-300), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """What a placement may cost, and what it must be worth. ValueError when invalid."""

    budget_bytes: tuple[int, ...]  # per rank, over all layers
    bytes_per_expert: int
    min_gain_ratio: float = 0.001  # of the layer's mean rank load per copy; raising it makes fewer copies
    noise_sigmas: float = 2.0  # gain over its standard error; raising it waits longer until a gain is believed
    min_windows: int = 4  # fewer say nothing about the spread
    max_added: int | None = None  # most new copies in one plan; None: no limit

    def __post_init__(self) -> None:
        if self.bytes_per_expert < 1:
            raise ValueError(f"bytes_per_expert must be at least 1, got {self.bytes_per_expert}")
        for rank, budget in enumerate(self.budget_bytes):
            if budget < 0:
                raise ValueError(f"budget_bytes must be >= 0, got {budget} for rank {rank}")
        for name, value in (("min_gain_ratio", self.min_gain_ratio), ("noise_sigmas", self.noise_sigmas)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value}")
        if self.min_windows < 2:
            raise ValueError(f"min_windows must be at least 2, got {self.min_windows}")


@dataclass(frozen=True)
class ReplicaPlan:
    """Where copies shall be, and what that changes. Ratios are forecast max / mean of rank loads."""

    replicas: tuple[Replica, ...]
    added: tuple[Replica, ...]
    dropped: tuple[Replica, ...]
    imbalance_before_L: tuple[float, ...]
    imbalance_after_L: tuple[float, ...]


def plan_replicas(
    forecast: Forecast, home_rank_LE: npt.NDArray[np.int64], present: Iterable[Replica], limits: ReplicaLimits
) -> ReplicaPlan:
    """Resident replicas within the limits, with few changes from the present ones; never two copies on one rank.

    home_rank_LE[layer, expert] is a rank. ValueError where the arguments contradict each other.
    """
    present = tuple(sorted(present))
    _check(forecast, home_rank_LE, present, limits)
    spending = _Spending(forecast, home_rank_LE, present, limits)
    before_L = tuple(layer.split.imbalance_ratio for layer in spending.layers)
    spending.fit_budget()
    for displaced_below in spending.thresholds():
        spending.spend(displaced_below)
    replicas = spending.replicas()
    return ReplicaPlan(
        replicas=replicas,
        added=tuple(sorted(set(replicas) - set(present))),
        dropped=tuple(sorted(set(present) - set(replicas))),
        imbalance_before_L=before_L,
        imbalance_after_L=tuple(layer.split.imbalance_ratio for layer in spending.layers),
    )


class _Step(NamedTuple):
    """Copies that lower one layer's highest rank load: pairs off that load per copy, and how many of them are sure."""

    value: float
    sure_value: float
    copies: tuple[tuple[int, int], ...]  # (expert, rank)


class _Layer:
    """One layer's forecast, split over the copies it has."""

    def __init__(
        self, forecast: Forecast, at: int, home_E: Ids, present: Sequence[Replica], limits: ReplicaLimits
    ) -> None:
        self._forecast, self._at = forecast, at
        self.pairs = forecast.pairs(at)
        self.split = Split(forecast.share(at), home_E, len(limits.budget_bytes))
        self.split.add((copy.expert, copy.rank) for copy in present)
        self.old = {(copy.expert, copy.rank) for copy in present}  # those of them that are still there
        self.version = 0
        self._losses: dict[tuple[int, int], float] = {}
        self._displaceable: tuple[float, Ids] | None = None
        self._most_value: float | None = None
        self._window_loads_WR: Floats | None = None
        self._mean = sum(self.split.rank_loads) / len(limits.budget_bytes)
        self._min_gain = limits.min_gain_ratio * self._mean
        self._sigmas = limits.noise_sigmas
        self._is_known = forecast.windows(at) >= limits.min_windows and self._mean > 0.0

    @property
    def min_value(self) -> float:
        """Pairs per copy that a step must be worth."""
        return self._min_gain * self.pairs

    def best_step(self, room_R: Ids) -> _Step | None:
        """The copies worth most per copy, at most room_R new ones on each rank; None where none is worth enough."""
        if not self._is_known:
            return None
        highest, room = self.split.highest_load, room_R.tolist()
        wishes: list[tuple[float, list[tuple[int, int]]]] = []
        for level in np.linspace(highest, self._mean, LEVELS + 1)[1:].tolist():
            copies = self.split.copies_for(level, room, self._min_gain)
            if copies is None:
                break
            if copies and highest - level >= self._min_gain * len(copies):
                wishes.append(((highest - level) / len(copies), copies))
                if wishes[-1][0] < PAST_BEST * max(per_copy for per_copy, _ in wishes):
                    break
        for _, copies in sorted(wishes, key=lambda wish: -wish[0])[:TRIALS]:
            new_loads_WR = self._window_loads(self.split.with_copies(copies))
            gain, error = self._forecast.gain(self._at, self.window_loads_WR, new_loads_WR)
            sure_gain = gain - self._sigmas * error
            if gain >= self._min_gain * len(copies) and sure_gain >= 0.0:
                per_copy = self.pairs / len(copies)
                return _Step(gain * per_copy, sure_gain * per_copy, tuple(copies))
        return None

    @property
    def most_value(self) -> float:
        """What the best step would surely be worth if there were room everywhere."""
        if self._most_value is None:
            everywhere = np.full(len(self.split.rank_loads), np.iinfo(np.int64).max)
            step = self.best_step(everywhere)
            self._most_value = step.sure_value if step is not None else 0.0
        return self._most_value

    def losses(self) -> dict[tuple[int, int], float]:
        """By how many pairs the windows' highest rank load would be higher without each old copy (expert, rank)."""
        if unknown := sorted(self.old - self._losses.keys()):
            weights_W = self._forecast.gain_weights(self._at) * self.pairs
            highest_W = self.window_loads_WR.max(axis=1)
            for expert, rank in unknown:
                without_W = self._window_loads(self.split.without(expert, rank)).max(axis=1)
                self._losses[expert, rank] = float(weights_W @ (without_W - highest_W))
        return self._losses

    def displaceable(self, below: float) -> Ids:
        """Old copies on each rank [R] whose loss is below that."""
        if self._displaceable is None or self._displaceable[0] != below:
            ranks = [rank for (_, rank), loss in self.losses().items() if loss < below]
            counts_R = np.bincount(ranks, minlength=len(self.split.rank_loads)).astype(np.int64)
            self._displaceable = (below, counts_R)
        return self._displaceable[1]

    @property
    def window_loads_WR(self) -> Floats:
        """Each rank's load in each window, as a share of the layer's pairs."""
        if self._window_loads_WR is None:
            self._window_loads_WR = self._forecast.rank_loads(self._at, self.split.parts, len(self.split.rank_loads))
        return self._window_loads_WR

    def _window_loads(self, other: Split) -> Floats:
        """As window_loads_WR, with another split: only what it moves is reckoned anew, for very many are tried."""
        moved = other.differing(self.split)
        return self.window_loads_WR + self._forecast.rank_loads(self._at, moved, len(self.split.rank_loads))

    def add(self, copies: Iterable[tuple[int, int]]) -> None:
        self.split.add(copies)
        self._changed()

    def drop(self, expert: int, rank: int) -> None:
        near = self.split.near(expert)
        self.split.drop(expert, rank)
        self.old.discard((expert, rank))
        # The highest load is no lower now: those that share no rank with it are missed no more than they were.
        far = {copy: loss for copy, loss in self._losses.items() if copy[0] not in near}
        self._changed()
        self._losses = far

    def _changed(self) -> None:
        self.version += 1
        self._losses = {}
        self._displaceable = self._most_value = self._window_loads_WR = None


class _Entry(NamedTuple):
    """A layer's best step while the layer was at `version`; the first in order is worth most."""

    minus_value: float
    layer: int
    version: int
    step: _Step


class _Spending:
    """The ranks' budgets, spent over the layers step by step on whatever is worth most per copy."""

    def __init__(
        self, forecast: Forecast, home_rank_LE: Ids, present: Sequence[Replica], limits: ReplicaLimits
    ) -> None:
        by_layer: dict[int, list[Replica]] = {}
        for copy in present:
            by_layer.setdefault(copy.layer, []).append(copy)
        self.layers = [
            _Layer(forecast, at, home_E, by_layer.get(at, ()), limits) for at, home_E in enumerate(home_rank_LE)
        ]
        self._room_R = np.array(limits.budget_bytes, dtype=np.int64) // limits.bytes_per_expert
        for copy in present:
            self._room_R[copy.rank] -= 1
        self._left = home_rank_LE.size * len(self._room_R) if limits.max_added is None else limits.max_added

    def replicas(self) -> tuple[Replica, ...]:
        return tuple(
            Replica(at, expert, rank) for at, layer in enumerate(self.layers) for expert, rank in layer.split.copies()
        )

    def fit_budget(self) -> None:
        """Drop the copies that are missed least from ranks whose budget has shrunk below what they hold."""
        for rank in np.flatnonzero(self._room_R < 0):
            while self._room_R[rank] < 0:
                self._drop_least(int(rank))

    def thresholds(self) -> Iterable[float]:
        """0: into free room only. Then, falling, losses below which a present copy may be displaced."""
        yield 0.0
        threshold = max((layer.most_value for layer in self.layers), default=0.0)
        lowest = min(layer.min_value for layer in self.layers)
        while threshold >= max(lowest / 2.0, 1e-12):
            yield threshold
            threshold /= 2.0

    def spend(self, displaced_below: float) -> None:
        """Take the best steps of all layers, until none is left that is surely worth more than what it may displace."""
        queue = [entry for at in range(len(self.layers)) if (entry := self._entry(at, displaced_below))]
        heapq.heapify(queue)
        while queue and self._left > 0:
            entry = heapq.heappop(queue)
            is_fresh = entry.version == self.layers[entry.layer].version
            if is_fresh and self._fits(entry.step, displaced_below):
                if len(entry.step.copies) > self._left:
                    continue
                self._take(entry)
            if again := self._entry(entry.layer, displaced_below):
                heapq.heappush(queue, again)

    def _entry(self, at: int, displaced_below: float) -> _Entry | None:
        layer = self.layers[at]
        if displaced_below and layer.most_value < displaced_below:
            return None  # less room than everywhere makes no step worth more
        step = layer.best_step(self._room(displaced_below))
        if step is None or step.sure_value < displaced_below:
            return None
        return _Entry(-step.value, at, layer.version, step)

    def _room(self, displaced_below: float) -> Ids:
        """Copies that each rank has room for, those counted in that may be displaced."""
        room_R = self._room_R.copy()
        for layer in self.layers if displaced_below else ():
            room_R += layer.displaceable(displaced_below)
        return room_R

    def _fits(self, step: _Step, displaced_below: float) -> bool:
        wanted_R = np.bincount([rank for _, rank in step.copies], minlength=len(self._room_R))
        return bool((wanted_R <= self._room(displaced_below)).all())

    def _take(self, entry: _Entry) -> None:
        for _, rank in entry.step.copies:
            if self._room_R[rank] <= 0:
                self._drop_least(rank)
            self._room_R[rank] -= 1
        self.layers[entry.layer].add(entry.step.copies)
        self._left -= len(entry.step.copies)

    def _drop_least(self, rank: int) -> None:
        """Drop the old copy on this rank that is missed least."""
        _, at, expert = min(
            (loss, at, expert)
            for at, layer in enumerate(self.layers)
            for (expert, holder), loss in layer.losses().items()
            if holder == rank
        )
        self.layers[at].drop(expert, rank)
        self._room_R[rank] += 1


def _check(forecast: Forecast, home_rank_LE: Ids, present: Sequence[Replica], limits: ReplicaLimits) -> None:
    _, num_layers, num_experts = forecast.share_WLE.shape
    num_ranks = len(limits.budget_bytes)
    if home_rank_LE.shape != (num_layers, num_experts):
        raise ValueError(f"home ranks must have shape {(num_layers, num_experts)}, got {home_rank_LE.shape}")
    if not num_ranks or not 0 <= home_rank_LE.min() <= home_rank_LE.max() < num_ranks:
        raise ValueError(f"home ranks must be in 0..{num_ranks - 1}, one budget per rank")
    for copy in present:
        limits_of = ((copy.layer, num_layers), (copy.expert, num_experts), (copy.rank, num_ranks))
        if not all(0 <= value < count for value, count in limits_of):
            raise ValueError(f"{copy} is not within {num_layers} layers, {num_experts} experts, {num_ranks} ranks")
        if home_rank_LE[copy.layer, copy.expert] == copy.rank:
            raise ValueError(f"{copy} is on the expert's home rank: one copy per rank is enough")
    if len(set(present)) != len(present):
        raise ValueError("present replicas must differ from each other")
