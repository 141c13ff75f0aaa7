"""Gated experts: each activation by its formula, with and without biases, grouped or one by one, lent or at home."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from llep.moe.layer import LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.swiglu import Activation, ClampedSwiglu, SwigluExperts, silu
from llep.moe.virtual import VirtualGroup, VirtualTransport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 16, 24, 2
CPU = torch.device("cpu")


def random_experts(activation: Activation, *, has_bias: bool, local: slice = slice(None)) -> SwigluExperts:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(EXPERTS, *shape, generator=generator)[local].clone()

    weights = random(2 * INTERMEDIATE, HIDDEN), random(HIDDEN, INTERMEDIATE) / 5
    biases = {"gate_up_bias_E2I": random(2 * INTERMEDIATE), "down_bias_EH": random(HIDDEN)} if has_bias else {}
    return SwigluExperts(*weights, **biases, activation=activation)


def expected(experts: SwigluExperts, row_H: torch.Tensor, expert: int) -> torch.Tensor:
    """One row by the formula, in double precision."""
    of = {name: tensor[expert].double() for name, tensor in experts.weights.items()}
    zero = torch.zeros(1, dtype=torch.float64)
    gate, up = (of["gate_up"] @ row_H.double() + of.get("gate_up_bias", zero)).split(INTERMEDIATE)
    if isinstance(experts.activation, ClampedSwiglu):
        alpha, limit = experts.activation.alpha, experts.activation.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
    else:
        inner = gate / (1 + torch.exp(-gate)) * up
    return of["down"] @ inner + of.get("down_bias", zero)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", [silu, ClampedSwiglu(), ClampedSwiglu(alpha=1.0, limit=2.0)])
def test_experts_compute_the_formula(activation: Activation, has_bias: bool) -> None:
    experts = random_experts(activation, has_bias=has_bias)
    experts_G, counts_G = np.array([0, 2, 5]), np.array([3, 1100, 1])  # also more than go through at a time
    rows_PH = torch.randn(1104, HIDDEN, generator=torch.Generator().manual_seed(1)) * 2
    gates_P = torch.rand(1104, generator=torch.Generator().manual_seed(2))
    found = experts.compute(experts.weights, rows_PH, experts_G, counts_G, gates_P)
    grouped = experts._compute_grouped(experts.weights, rows_PH, experts_G, counts_G) * gates_P[:, None]
    torch.testing.assert_close(grouped, found, rtol=1e-4, atol=1e-4)
    for place in (0, 2, 3, 514, 515, 516, 1102, 1103):
        expert = int(np.repeat(experts_G, counts_G)[place])
        wanted = gates_P[place].double() * expected(experts, rows_PH[place], expert)
        torch.testing.assert_close(found[place].double(), wanted, rtol=1e-4, atol=1e-4)


def compute_sharded(
    activation: Activation, ids_RTK: torch.Tensor, transport: VirtualTransport
) -> tuple[torch.Tensor, int]:
    rank, local = transport.rank, EXPERTS // transport.size
    experts = random_experts(activation, has_bias=True, local=slice(rank * local, (rank + 1) * local))
    placement = Placement.linear(EXPERTS, transport.size, 1)
    layer = LeastLoadedMoE(
        experts,
        transport,
        LendingPool.reserve(experts.weights, 1),
        placement.home_rank,
        [expert % local for expert in range(EXPERTS)],
        Workspace(64, 64),
    )
    hidden_TH = torch.randn(ids_RTK.shape[1], HIDDEN, generator=torch.Generator().manual_seed(rank))
    gates_TK = torch.full(ids_RTK.shape[1:], 0.5)
    choose = partial(plan_step, "quota", placement=placement, options=PlanOptions(min_chunk_tokens=1))
    result = layer.forward_sharded(hidden_TH, gates_TK, ids_RTK[rank], lambda counts: choose(counts_RE=counts))
    return result.output_TH, len(result.plan.lends)


@pytest.mark.parametrize("activation", [silu, ClampedSwiglu()])
def test_biases_are_lent_with_their_expert(activation: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_RTK = torch.rand(3, 40, 3, generator=generator).argsort(dim=-1)[..., :TOP_K]  # nothing for the last rank
    results = VirtualGroup(3, CPU).run(partial(compute_sharded, activation, ids_RTK))
    experts = random_experts(activation, has_bias=True)
    assert results[0][1] > 0
    for rank, (output_TH, _) in enumerate(results):
        hidden_TH = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(rank))
        for token in range(0, 40, 7):
            wanted = sum(0.5 * expected(experts, hidden_TH[token], int(e)) for e in ids_RTK[rank, token])
            torch.testing.assert_close(output_TH[token].double(), wanted, rtol=1e-4, atol=1e-4)


def test_one_bias_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both gate_up_bias_E2I and down_bias_EH"):
        SwigluExperts(torch.ones(1, 2, 2), torch.ones(1, 2, 1), down_bias_EH=torch.ones(1, 2))
