"""What the windows of one engine say, as plain numbers: all that decisions are made from. Pure.

Shape letters: P phases of steps (prefill, decode), L layers, R ranks, E experts, N windows, W fields of Worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.cost import CostModel
from llep.messages import STEP_PHASES

Floats = npt.NDArray[np.float64]

LENT_S, LENT_PAIRS, LENT_STEPS, PROBED_S, PROBED_PAIRS, PROBED_STEPS = range(6)  # as in llep.messages.Worth
FEWEST_WINDOWS = 4  # with probes: fewer say nothing about the spread
FEWEST_PROBED_STEPS = 20
FEWEST_LENT_STEPS = 50
SURE_SIGMAS = 2.0


class Gain(NamedTuple):
    """Time that lending saved inside the layers that lent, measured against steps that were computed by plain EP."""

    ratio: float  # of plain EP's time; negative: lending makes it slower
    error: float  # standard error of the ratio
    saved_s: float
    lent_steps: int
    probed_steps: int

    @property
    def is_surely_positive(self) -> bool:
        return self.ratio - SURE_SIGMAS * self.error > 0.0

    @property
    def is_surely_negative(self) -> bool:
        return self.ratio + SURE_SIGMAS * self.error < 0.0


def measured_gain(worth_NPW: Floats) -> Gain | None:
    """The gain over N windows; None where there are too few probes to tell it from chance.

    The error is the jackknife's: by how much the ratio changes when one window is left out.
    """
    busy_NPW = worth_NPW[worth_NPW[:, :, PROBED_STEPS].sum(axis=1) > 0]
    total_PW = worth_NPW.sum(axis=0)
    lent_steps, probed_steps = (int(total_PW[:, at].sum()) for at in (LENT_STEPS, PROBED_STEPS))
    if len(busy_NPW) < FEWEST_WINDOWS or probed_steps < FEWEST_PROBED_STEPS or lent_steps < FEWEST_LENT_STEPS:
        return None
    ratio, saved_s = _gain(total_PW)
    left_out_N = np.array([_gain(total_PW - window_PW)[0] for window_PW in busy_NPW])
    count = len(left_out_N)
    error = math.sqrt((count - 1) / count * float(((left_out_N - left_out_N.mean()) ** 2).sum()))
    return Gain(ratio, error, saved_s, lent_steps, probed_steps)


def saved_s(worth_PW: Floats) -> float:
    """Seconds saved by lending, in the phases that have been probed."""
    return _gain(worth_PW)[1]


def _gain(worth_PW: Floats) -> tuple[float, float]:
    """(ratio, seconds saved) over the phases that have been probed."""
    is_probed_P = worth_PW[:, PROBED_PAIRS] > 0
    seconds_per_pair_P = worth_PW[:, PROBED_S] / np.maximum(worth_PW[:, PROBED_PAIRS], 1.0)
    plain_s = float((worth_PW[:, LENT_PAIRS] * seconds_per_pair_P)[is_probed_P].sum())
    lent_s = float(worth_PW[:, LENT_S][is_probed_P].sum())
    return (1.0 - lent_s / plain_s if plain_s > 0 else 0.0), plain_s - lent_s


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One engine over the last window_s. Seconds are means over ranks; ratios are nan where there was no layer-step."""

    settings: Settings  # those that are live
    window_s: float
    ep_size: int
    num_layers: int
    top_k: int
    bytes_per_expert: int
    is_one_node: bool
    cost_model: CostModel | None
    tokens_P: Floats
    layer_steps_P: Floats
    before_P: Floats  # mean imbalance ratio under plain EP
    after_P: Floats  # as computed; in mode shadow as planned
    layer_seconds_P: Floats
    phase_seconds: dict[str, float]  # llep.messages.LAYER_PHASES
    lends: float
    lend_bytes: float
    decisions: dict[str, float]
    predicted_gain_s: float
    worth_NPW: Floats = field(repr=False)

    @property
    def layer_steps(self) -> float:
        return float(self.layer_steps_P.sum())

    @property
    def layer_seconds(self) -> float:
        return float(self.layer_seconds_P.sum())

    @property
    def compute_share(self) -> float:
        """Of the time inside layers; 1 where nobody has measured the phases."""
        total = sum(self.phase_seconds.values())
        return self.phase_seconds.get("compute", 0.0) / total if total > 0 else 1.0

    @cached_property
    def gain(self) -> Gain | None:
        return measured_gain(self.worth_NPW)

    @cached_property
    def gain_by_phase(self) -> dict[str, Gain | None]:
        return {phase: measured_gain(self.worth_NPW[:, [at]]) for at, phase in enumerate(STEP_PHASES)}

    @property
    def batch_tokens_P(self) -> Floats:
        """Mean tokens of a step by phase; nan without one."""
        with np.errstate(invalid="ignore", divide="ignore"):
            tokens_P: Floats = self.tokens_P / (self.layer_steps_P / self.num_layers)
        return tokens_P

    def mean_ratio(self, ratio_P: Floats) -> float | None:
        """Over both phases, by layer-steps."""
        is_busy_P = self.layer_steps_P > 0
        if not is_busy_P.any():
            return None
        return float(np.average(ratio_P[is_busy_P], weights=self.layer_steps_P[is_busy_P]))
