"""What recordings and generated loads have in common: the shape of a model's MoE layers, and the counts of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llep.errors import SettingsError

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """MoE layers of one model. Hidden and intermediate sizes are 0 where nobody stated them."""

    name: str
    layer_numbers: tuple[int, ...]  # the model's own numbers of its MoE layers
    num_experts: int
    top_k: int
    hidden_size: int = 0
    intermediate_size: int = 0  # of one expert
    bytes_per_expert: int = 0  # of one layer, as served

    @property
    def num_layers(self) -> int:
        return len(self.layer_numbers)


class StepCounts(NamedTuple):
    """Counts of one step: counts_LRE[layer, rank, expert] = pairs routed from that rank's tokens.

    Layers are in the order of the model's layer_numbers.
    """

    step: int
    phase: str  # one of PHASES
    counts_LRE: npt.NDArray[np.int64]


def _shape(
    name: str, layers: range, num_experts: int, top_k: int, hidden: int, intermediate: int, bits_per_weight: float
) -> ModelShape:
    """Gate, up and down projections: 3 x hidden x intermediate weights per expert, scales counted in the bits."""
    return ModelShape(
        name=name,
        layer_numbers=tuple(layers),
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        bytes_per_expert=int(3 * hidden * intermediate * bits_per_weight / 8),
    )


MXFP4_BITS = 4.25  # a byte of scale for every 32 weights
FP8_BLOCK_BITS = 8 + 32 / (128 * 128)  # a float32 scale for every 128 x 128 block
BF16_BITS = 16.0

# From the models' published configurations, in the precision in which they are published.
SHAPES = {
    shape.name: shape
    for shape in (
        _shape("gpt-oss-20b", range(24), 32, 4, 2880, 2880, MXFP4_BITS),
        _shape("gpt-oss-120b", range(36), 128, 4, 2880, 2880, MXFP4_BITS),
        _shape("deepseek-v3", range(3, 61), 256, 8, 7168, 2048, FP8_BLOCK_BITS),
        _shape("kimi-k2", range(1, 61), 384, 8, 7168, 2048, FP8_BLOCK_BITS),
        _shape("qwen3-235b", range(94), 128, 8, 4096, 1536, BF16_BITS),
    )
}


def shape_of(name: str) -> ModelShape:
    """The preset of that name. Raises SettingsError for an unknown one."""
    try:
        return SHAPES[name.lower()]
    except KeyError:
        raise SettingsError(f"model={name!r} is unknown; choose one of {', '.join(SHAPES)}", param="model") from None


def split_sources(counts_RE: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.int64]:
    """The same tokens on another number of source ranks: ranks are merged or split evenly, keeping the token order.

    Each expert's tokens keep their global order (rank 0's first); with neither a multiple nor a divisor of the
    present number of ranks, each expert's tokens are dealt out evenly over all ranks.
    """
    present, num_experts = counts_RE.shape
    if num_ranks == present:
        return counts_RE
    if present % num_ranks == 0:
        merged_RE: npt.NDArray[np.int64] = counts_RE.reshape(num_ranks, -1, num_experts).sum(axis=1)
        return merged_RE
    if num_ranks % present:
        return split_sources(counts_RE.sum(axis=0, keepdims=True), num_ranks)
    parts = num_ranks // present
    share, rest = np.divmod(counts_RE[:, None, :], parts)
    # The rest of expert e goes to parts e, e+1, ...: always to part 0 would load it with every remainder.
    turn = (np.arange(parts)[:, None] - np.arange(num_experts)) % parts
    split_RE: npt.NDArray[np.int64] = (share + (turn < rest)).reshape(num_ranks, num_experts)
    return split_RE
