"""What a planner did over all layers and steps, in memory that does not grow with them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt

from llep.simulate.setup import Setup


class Histogram:
    """Counts of positive values in bins half a percent wide: quantiles of any number of values in bounded memory."""

    BINS_PER_E = 200  # bins while the value grows by a factor of e

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self.lowest, self.highest = math.inf, 0.0
        self._bins: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        self._bins[round(math.log(max(value, 1e-12)) * self.BINS_PER_E)] += 1

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value below which that share of the values lies, within half a percent; NaN without values."""
        if not self.count:
            return math.nan
        wanted, seen = share * self.count, 0
        for bin_ in sorted(self._bins):
            seen += self._bins[bin_]
            if seen >= wanted:
                return min(max(math.exp(bin_ / self.BINS_PER_E), self.lowest), self.highest)
        return self.highest


class Series:
    """Means over the course of the steps, at most `points` of them: when there are more, neighbours are merged."""

    def __init__(self, points: int = 200) -> None:
        self._points, self._width = points, 1
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, value: float) -> None:
        if len(self._counts) == self._points and self._counts[-1] == self._width:
            self._merge()
        if not self._counts or self._counts[-1] == self._width:
            self._sums.append(0.0)
            self._counts.append(0)
        self._sums[-1] += value
        self._counts[-1] += 1

    def _merge(self) -> None:
        self._width *= 2
        pairs = range(0, len(self._counts), 2)
        self._sums = [sum(self._sums[at : at + 2]) for at in pairs]
        self._counts = [sum(self._counts[at : at + 2]) for at in pairs]

    @property
    def width(self) -> int:
        """Steps in one point."""
        return self._width

    @property
    def means(self) -> list[float]:
        return [total / count for total, count in zip(self._sums, self._counts, strict=True)]


class Tally:
    """Sums, peaks and distributions over layers and steps. moved: resident copies made so far."""

    def __init__(self, name: str, setup: Setup) -> None:
        layers, ranks = setup.shape.num_layers, setup.num_ranks
        self.name = name
        self.ratios, self.plan_us, self.series = Histogram(), Histogram(), Series()
        self.ratio_sum_L, self.layer_steps_L = np.zeros(layers), np.zeros(layers, dtype=np.int64)
        self.decisions: Counter[str] = Counter()
        self.lends = self.moved = 0
        self.spilled_tokens = self.highest_tokens = self.mean_tokens = self.predicted_s = 0.0
        self.peak_bytes_R = np.zeros(ranks, dtype=np.int64)
        self.most_lends_R = np.zeros(ranks, dtype=np.int64)

    def add(
        self,
        layer: int,
        decision: str,
        loads_R: npt.NDArray[np.float64],
        lends_R: npt.NDArray[np.int64],
        used_bytes_R: npt.NDArray[np.int64],
        spilled_tokens: float,
        seconds: float,
    ) -> float:
        """Count one layer of one step with at least one token; its imbalance ratio."""
        highest, mean = float(loads_R.max()), float(loads_R.mean())
        ratio = highest / mean
        self.ratios.add(ratio)
        self.ratio_sum_L[layer] += ratio
        self.layer_steps_L[layer] += 1
        self.decisions[decision] += 1
        self.lends += int(lends_R.sum())
        self.spilled_tokens += spilled_tokens
        self.highest_tokens += highest
        self.mean_tokens += mean
        self.predicted_s += seconds
        np.maximum(self.most_lends_R, lends_R, out=self.most_lends_R)
        np.maximum(self.peak_bytes_R, used_bytes_R, out=self.peak_bytes_R)
        return ratio
