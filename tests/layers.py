"""A small MoE layer for tests: its weights, tokens that its router skews, and what one process makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from llep.moe.layer import Group, LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.swiglu import SwigluExperts
from llep.moe.workspace import Workspace

HIDDEN, INTERMEDIATE, TOP_K = 32, 48, 2
LARGE = Workspace(chunk_rows=4096, wire_rows=4096)


@lru_cache(maxsize=32)  # every rank asks for them at every step
def all_weights(num_experts: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, and down, of all experts: to read, or to copy from."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(num_experts, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    return gate_up, down


def routed_tokens(
    rng: np.random.Generator, tokens: int, num_experts: int, hot_experts: list[int], hot_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], gates [T, K], distinct expert ids [T, K], of which hot_share favour hot_experts."""
    scores = rng.random((tokens, num_experts))
    scores[:, hot_experts] += rng.random((tokens, 1)) < hot_share
    ids = torch.from_numpy(np.argsort(-scores, axis=1)[:, :TOP_K].copy()).to(torch.int32)
    gates = torch.from_numpy(rng.random((tokens, TOP_K), dtype=np.float32))
    return torch.from_numpy(rng.standard_normal((tokens, HIDDEN), dtype=np.float32)), gates, ids


def reference(
    hidden: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor, num_experts: int, seed: int = 7
) -> torch.Tensor:
    """What one process that has all experts computes, pair by pair."""
    gate_up, down = all_weights(num_experts, seed)
    output = torch.zeros_like(hidden)
    for k in range(ids.shape[1]):
        for expert in set(ids[:, k].tolist()):
            rows = (ids[:, k] == expert).nonzero()[:, 0]
            gate, up = (hidden[rows] @ gate_up[expert].T).chunk(2, dim=-1)
            output[rows] += gates[rows, k, None] * ((F.silu(gate) * up) @ down[expert].T)
    return output


class ChosenSwiglu(SwigluExperts):
    """Computes every token with every row, and leaves out in the sum what isn't chosen: nothing depends on values."""

    def compute_chosen(
        self, bank: Mapping[str, torch.Tensor], hidden_TH: torch.Tensor, gates_TK: torch.Tensor, rows_TK: torch.Tensor
    ) -> torch.Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        for row, (gate_up, down) in enumerate(zip(bank["gate_up"], bank["down"], strict=True)):
            gate, up = F.linear(hidden_TH, gate_up).chunk(2, dim=-1)
            output_TH += (gates_TK * (rows_TK == row)).sum(dim=1, keepdim=True) * F.linear(F.silu(gate) * up, down)
        return output_TH


def make_layer_on(
    group: Group,
    home_rank: Sequence[int],
    slots: int,
    workspace: Workspace,
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
) -> LeastLoadedMoE:
    """This rank's end of the layer, on the group's device."""
    num_experts = len(home_rank)
    mine = [expert for expert in range(num_experts) if home_rank[expert] == group.rank]
    experts = ChosenSwiglu(*(tensor[mine].to(group.device, dtype) for tensor in all_weights(num_experts, seed)))
    pool = LendingPool.reserve(experts.weights, slots)
    local_ids = [sum(home_rank[other] == home_rank[expert] for other in range(expert)) for expert in range(num_experts)]
    return LeastLoadedMoE(experts, group, pool, home_rank, local_ids, workspace)
