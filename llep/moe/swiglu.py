"""SwiGLU experts in plain torch: the reference that the layer is tested with, and experts for any torch program."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from llep.moe.dispatch import Index


class SwigluExperts:
    """down(silu(gate(x)) * up(x)) for each expert.

    gate_up_E2IH: [local experts, 2 x intermediate, hidden], gates first.
    down_EHI: [local experts, hidden, intermediate].
    """

    def __init__(self, gate_up_E2IH: torch.Tensor, down_EHI: torch.Tensor) -> None:
        self.weights = {"gate_up": gate_up_E2IH, "down": down_EHI}

    def compute(
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        gates_P: torch.Tensor,
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H]; see llep.moe.layer.Experts."""
        output_PH = torch.empty_like(rows_PH)
        if _is_grouped(rows_PH):
            self._compute_grouped(bank, rows_PH, experts_G, counts_G, output_PH)
        else:
            stops_G = np.cumsum(counts_G).tolist()
            for expert, start, stop in zip(experts_G.tolist(), [0, *stops_G], stops_G, strict=False):
                gate, up = F.linear(rows_PH[start:stop], bank["gate_up"][expert]).chunk(2, dim=-1)
                torch.matmul(F.silu(gate, inplace=True).mul_(up), bank["down"][expert].T, out=output_PH[start:stop])
        return output_PH.mul_(gates_P[:, None])

    def _compute_grouped(
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        output_PH: torch.Tensor,
    ) -> None:
        """All experts of the bank in two kernels, those without rows included."""
        counts_E = np.zeros(len(bank["down"]), dtype=np.int32)
        counts_E[experts_G] = counts_G
        stops_E = torch.from_numpy(np.cumsum(counts_E, dtype=np.int32)).to(rows_PH.device)
        both_PI = torch._grouped_mm(rows_PH, bank["gate_up"].transpose(1, 2), offs=stops_E)
        gate, up = both_PI.chunk(2, dim=-1)
        output_PH.copy_(torch._grouped_mm(F.silu(gate) * up, bank["down"].transpose(1, 2), offs=stops_E))


def _is_grouped(rows_PH: torch.Tensor) -> bool:
    """Where the grouped kernel is faster: bench/layer/kernels measures it. Its tensors are aligned to 16 bytes."""
    return rows_PH.is_cuda and rows_PH.dtype == torch.bfloat16 and rows_PH.shape[1] % 8 == 0
