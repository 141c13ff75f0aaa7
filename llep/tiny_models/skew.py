"""How hot the hot experts are: simulates routers on random hidden states to find the bias that gives a stated share.

Shape letters: T tokens, E experts, H hidden, K top-k, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llep.errors import SettingsError
from llep.tiny_models.architectures import moe_layers, router_name
from llep.tiny_models.options import MAX_BIAS, Kind, Options
from llep.tiny_models.tensors import BLOCK_STD, CONSTANT, RESERVED, Floats, router

SAMPLE_TOKENS = 4096
DEFAULT_HOT_SHARE = 0.9
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Skew:
    """What was done to the hot experts in each MoE layer, and the share of pairs that they get by simulation."""

    biases: list[float]
    shares: list[float]

    @property
    def share(self) -> float:
        return sum(self.shares) / len(self.shares)


def find_skew(options: Options) -> Skew:
    """Biases by layer: the stated one, or the one that gives the stated share. Without hot experts: none, no share."""
    if not options.hot:
        return Skew([], [])
    biases, shares = [], []
    for layer in moe_layers(options):
        sample = _Sample(options, layer)
        bias = options.hot_bias if options.hot_bias is not None else _bisect(sample, options)
        biases.append(bias)
        shares.append(sample.hot_share(bias))
    return Skew(biases, shares)


class _Sample:
    """Router outputs of one layer on random hidden states."""

    def __init__(self, options: Options, layer: int) -> None:
        self.options = options
        rng = np.random.default_rng([options.seed, layer])
        hidden_TH = rng.standard_normal((SAMPLE_TOKENS, options.hidden), dtype=np.float32)
        # Each earlier block has added its part: attention in full only where it looks at few tokens, so count half.
        hidden_TH *= np.float32(np.sqrt(1 + layer * 1.5 * BLOCK_STD**2 + 0.5 * BLOCK_STD**2))
        hidden_TH[:, :RESERVED] = 0
        hidden_TH[:, CONSTANT] = 1
        hidden_TH /= np.sqrt(np.mean(hidden_TH**2, axis=1, keepdims=True))
        weight_EH = router(options.experts, options.hidden).draw(router_name(options, layer), options.seed)
        self.logits_TE: Floats = hidden_TH @ weight_EH.T
        self.constant_T1 = hidden_TH[:, CONSTANT : CONSTANT + 1]

    def hot_share(self, bias: float) -> float:
        """Share of pairs that the hot experts get."""
        chosen_TK = _choose(self.options, self._scores(bias))
        return float(np.isin(chosen_TK, self.options.hot).mean())

    def _scores(self, bias: float) -> Floats:
        scores_TE = self.logits_TE.copy()
        if self.options.kind is Kind.DEEPSEEK:
            scores_TE = np.float32(1) / (np.float32(1) + np.exp(-scores_TE))
        pushed = bias * self.constant_T1 if self.options.kind is Kind.QWEN3 else np.float32(bias)
        scores_TE[:, list(self.options.hot)] += pushed
        return scores_TE


def _choose(options: Options, scores_TE: Floats) -> npt.NDArray[np.int64]:
    """The top-k experts of each token [T, K]; DeepSeek's from the groups whose two best experts score highest."""
    if options.kind is Kind.DEEPSEEK and options.expert_groups > 1:
        scores_TGE = scores_TE.reshape(len(scores_TE), options.expert_groups, -1)
        group_scores_TG = np.sort(scores_TGE, axis=2)[:, :, -2:].sum(axis=2)
        dropped_TG = np.argsort(group_scores_TG, axis=1)[:, : options.expert_groups - options.chosen_groups]
        np.put_along_axis(scores_TGE, dropped_TG[:, :, None], -np.inf, axis=1)
        scores_TE = scores_TGE.reshape(scores_TE.shape)
    return np.argpartition(-scores_TE, options.top_k - 1, axis=1)[:, : options.top_k]


def _wanted_share(options: Options) -> float:
    if options.hot_share is not None:
        return options.hot_share
    lowest, highest = options.hot_share_range
    return min(max(DEFAULT_HOT_SHARE, lowest), highest)


def _bisect(sample: _Sample, options: Options) -> float:
    """The least bias whose share reaches the wanted one (shares grow with the bias)."""
    wanted = _wanted_share(options)
    low, high = -MAX_BIAS, MAX_BIAS
    for _ in range(28):
        middle = (low + high) / 2
        if sample.hot_share(middle) < wanted:
            low = middle
        else:
            high = middle
    share = sample.hot_share(high)
    if abs(share - wanted) > TOLERANCE:
        raise SettingsError(
            f"--hot-share {wanted} is not possible: where a token chooses from {options.chosen_groups} of "
            f"{options.expert_groups} expert groups, the nearest is {share:.3f}; change --hot-share, --hot or --groups",
            param="hot-share",
        )
    return high
