"""What the routers of a transformers model choose: counts of each expert, and the loss that keeps them from collapsing.

Shape letters: L MoE layers, T tokens, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement

RANKS = (2, 4, 8, 16)

Counts = npt.NDArray[np.int64]


class Routing:
    """Watches a model's routers. Everything asked is about its last forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        routers = [
            module
            for name, module in model.named_modules()
            if name.endswith(("mlp.router", "mlp.gate")) and hasattr(module, "num_experts")
        ]
        assert routers, "transformers names its routers mlp.router or mlp.gate"
        self._num_experts: int = int(routers[0].num_experts)
        self._is_sigmoid = hasattr(routers[0], "e_score_correction_bias")
        self._logits_TE: list[torch.Tensor] = [torch.empty(0)] * len(routers)
        self._ids_TK: list[torch.Tensor] = [torch.empty(0)] * len(routers)
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._note(layer))

    def _note(self, layer: int) -> Any:
        def note(
            module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> None:
            self._logits_TE[layer], _, self._ids_TK[layer] = outputs

        return note

    def counts(self) -> Counts:
        """Pairs of each expert [L, E]."""
        return np.stack([torch.bincount(ids.reshape(-1), minlength=self._num_experts).numpy() for ids in self._ids_TK])

    def balance_loss(self) -> torch.Tensor:
        """Mean over layers of experts x sum(share x probability), as in Switch Transformer: 1 where all are alike."""
        losses = []
        for logits_TE, ids_TK in zip(self._logits_TE, self._ids_TK, strict=True):
            scores_TE = torch.sigmoid(logits_TE) if self._is_sigmoid else torch.softmax(logits_TE, dim=-1)
            probability_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
            share_E = torch.bincount(ids_TK.reshape(-1), minlength=self._num_experts) / ids_TK.numel()
            losses.append(self._num_experts * (share_E * probability_E).sum())
        return torch.stack(losses).mean()


def ratios(counts_LE: Counts) -> dict[int, list[float]]:
    """ranks -> imbalance ratio under plain EP of each layer, for each of RANKS that the experts go around for."""
    num_experts = counts_LE.shape[1]
    return {ranks: [_ratio(counts_E, ranks) for counts_E in counts_LE] for ranks in RANKS if ranks <= num_experts}


def _ratio(counts_E: Counts, ranks: int) -> float:
    home_rank = Placement.linear(len(counts_E), ranks, 0).home_rank
    return imbalance_ratio(home_loads(counts_E, home_rank, ranks))
