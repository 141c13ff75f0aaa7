"""Gated experts in plain torch: the reference that the layer is tested with, and experts for any torch program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from llep.moe.dispatch import Index

# Rows of one expert that go through its matrices at a time on a CPU: enough for full speed (bench.kernels), few enough
# that an expert which gets everything needs no more room than many which share it.
ROWS_AT_A_TIME = 512


class Activation(Protocol):
    """activation(gate, up) -> [P, I]. It may overwrite both."""

    def __call__(self, gate_PI: torch.Tensor, up_PI: torch.Tensor, /) -> torch.Tensor: ...


def silu(gate_PI: torch.Tensor, up_PI: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up: Qwen's, DeepSeek's, Mixtral's."""
    return F.silu(gate_PI, inplace=True).mul_(up_PI)


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """gate x sigmoid(alpha x gate) x (up + 1), gate at most `limit`, up within it: gpt-oss's."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_PI: torch.Tensor, up_PI: torch.Tensor, /) -> torch.Tensor:
        gate_PI.clamp_(max=self.limit)
        up_PI.clamp_(-self.limit, self.limit).add_(1)
        return torch.sigmoid(gate_PI * self.alpha).mul_(gate_PI).mul_(up_PI)


class SwigluExperts:
    """down(activation(gate(x), up(x))) for each expert.

    gate_up_E2IH: [local experts, 2 x intermediate, hidden], gates first (gpt-oss's checkpoints hold them in turn: take
    [:, 0::2] and [:, 1::2]). down_EHI: [local experts, hidden, intermediate]. Biases: [local experts, 2 x intermediate]
    and [local experts, hidden], both or none.
    """

    def __init__(
        self,
        gate_up_E2IH: torch.Tensor,
        down_EHI: torch.Tensor,
        *,
        gate_up_bias_E2I: torch.Tensor | None = None,
        down_bias_EH: torch.Tensor | None = None,
        activation: Activation = silu,
    ) -> None:
        self.weights = {"gate_up": gate_up_E2IH, "down": down_EHI}
        if (gate_up_bias_E2I is None) != (down_bias_EH is None):
            raise ValueError("give both gate_up_bias_E2I and down_bias_EH, or none")
        if gate_up_bias_E2I is not None and down_bias_EH is not None:
            self.weights |= {"gate_up_bias": gate_up_bias_E2I, "down_bias": down_bias_EH}
        self.activation = activation

    def compute(
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        gates_P: torch.Tensor,
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H]; see llep.moe.layer.Experts."""
        if _is_grouped(rows_PH):
            output_PH = self._compute_grouped(bank, rows_PH, experts_G, counts_G)
        else:
            output_PH = torch.empty_like(rows_PH)
            stops_G = np.cumsum(counts_G).tolist()
            for expert, first, stop in zip(experts_G.tolist(), [0, *stops_G], stops_G, strict=False):
                for start in range(first, stop, ROWS_AT_A_TIME):
                    rows = slice(start, min(start + ROWS_AT_A_TIME, stop))
                    self._compute_one(bank, expert, rows_PH[rows], output_PH[rows])
        return output_PH.mul_(gates_P[:, None])

    def _compute_one(
        self, bank: Mapping[str, torch.Tensor], expert: int, rows_PH: torch.Tensor, output_PH: torch.Tensor
    ) -> None:
        has_bias = "down_bias" in bank
        both_P2I = F.linear(rows_PH, bank["gate_up"][expert], bank["gate_up_bias"][expert] if has_bias else None)
        inner_PI = self.activation(*both_P2I.chunk(2, dim=-1))
        if has_bias:
            torch.addmm(bank["down_bias"][expert], inner_PI, bank["down"][expert].T, out=output_PH)
        else:
            torch.matmul(inner_PI, bank["down"][expert].T, out=output_PH)

    def _compute_grouped(
        self, bank: Mapping[str, torch.Tensor], rows_PH: torch.Tensor, experts_G: Index, counts_G: Index
    ) -> torch.Tensor:
        """All experts of the bank in two kernels, those without rows included."""
        counts_E = np.zeros(len(bank["down"]), dtype=np.int32)
        counts_E[experts_G] = counts_G
        stops_E = torch.from_numpy(np.cumsum(counts_E, dtype=np.int32)).to(rows_PH.device)
        both_P2I = torch._grouped_mm(rows_PH, bank["gate_up"].transpose(1, 2), offs=stops_E)
        has_bias = "down_bias" in bank
        if has_bias:
            expert_P = torch.from_numpy(np.repeat(experts_G, counts_G)).to(rows_PH.device)
            both_P2I += bank["gate_up_bias"][expert_P]
        inner_PI = self.activation(*both_P2I.chunk(2, dim=-1)).contiguous()
        output_PH: torch.Tensor = torch._grouped_mm(inner_PI, bank["down"].transpose(1, 2), offs=stops_E)
        return output_PH.add_(bank["down_bias"][expert_P]) if has_bias else output_PH


def _is_grouped(rows_PH: torch.Tensor) -> bool:
    """Where the grouped kernel is at hand and its tensors are aligned to 16 bytes. On a CPU it is no faster than one
    expert after the other, and needs more room (bench.kernels)."""
    return rows_PH.is_cuda and rows_PH.dtype == torch.bfloat16 and rows_PH.shape[1] % 8 == 0
