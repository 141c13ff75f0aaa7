"""SwiGLU experts in plain torch: the reference that the layer is tested with, and experts for any torch program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F


class SwigluExperts:
    """down(silu(gate(x)) * up(x)) for each expert.

    gate_up_E2IH: [local experts, 2 x intermediate, hidden], gates first.
    down_EHI: [local experts, hidden, intermediate].
    """

    def __init__(self, gate_up_E2IH: torch.Tensor, down_EHI: torch.Tensor) -> None:
        self.weights = {"gate_up": gate_up_E2IH, "down": down_EHI}

    def compute(
        self, bank: Mapping[str, torch.Tensor], rows_PH: torch.Tensor, experts_P: torch.Tensor, gates_P: torch.Tensor
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H], one GEMM pair per expert in use."""
        output_PH = torch.empty_like(rows_PH)
        for expert in torch.unique(experts_P).tolist():
            rows = (experts_P == expert).nonzero()[:, 0]
            gate, up = F.linear(rows_PH[rows], bank["gate_up"][expert]).chunk(2, dim=-1)
            output_PH[rows] = F.linear(F.silu(gate) * up, bank["down"][expert]) * gates_P[rows, None].to(rows_PH.dtype)
        return output_PH
