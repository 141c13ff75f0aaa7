"""One check for every device: virtual ranks of one process give what one process gives."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from llep.config import Settings
from llep.moe.virtual import VirtualGroup, VirtualTransport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.plan import Plan, check_plan
from llep.planning.policy import Step, decide
from tests.layers import make_layer_on, reference, routed_tokens

torch.set_num_threads(1)  # ranks are threads already
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def assert_equals_one_process(
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    num_experts: int,
    *,
    is_round_robin: bool,
    is_replicated: bool,
    room: tuple[int, int] = (4096, 4096),
) -> int:
    """Six steps of random skew, ragged and empty sources among them; -> how many experts were lent."""
    linear = Placement.linear(num_experts, size, 0).home_rank
    home_rank = tuple(expert % size for expert in range(num_experts)) if is_round_robin else linear
    placement = Placement(home_rank, (1,) * size)
    results = VirtualGroup(size, device).run(
        partial(_steps, placement, dtype, Workspace(*room), is_replicated=is_replicated)
    )
    for step, outputs in enumerate(zip(*(outputs for outputs, _ in results), strict=True)):
        batches = [_batch(step, 0 if is_replicated else rank, num_experts) for rank in range(size)]
        expected = [reference(*batch, num_experts) for batch in batches]
        found = [torch.stack(outputs).sum(dim=0)] * size if is_replicated else list(outputs)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            if len(other):
                error = float((one - other).abs().max() / other.abs().max())
                assert error < TOLERANCES[dtype], f"step {step}: {error}"
    return results[0][1]


def _steps(
    placement: Placement, dtype: torch.dtype, room: Workspace, transport: VirtualTransport, *, is_replicated: bool
) -> tuple[list[torch.Tensor], int]:
    workspace = Workspace(room.chunk_rows, room.wire_rows)
    layer = make_layer_on(transport, placement.home_rank, placement.free_slots[0], workspace, dtype)
    outputs, lends = [], 0
    for step in range(6):
        hidden, gates, ids = _batch(step, 0 if is_replicated else transport.rank, placement.num_experts)
        batch = hidden.to(transport.device, dtype), gates.to(transport.device), ids.to(transport.device)
        choose = partial(_decide, placement)
        if is_replicated:
            result = layer.forward_replicated(*batch, choose, agree=True)
        else:
            result = layer.forward_sharded(*batch, choose)
        outputs.append(result.output_TH.cpu().float())
        lends += len(result.plan.lends)
    return outputs, lends


def _batch(step: int, rank: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shared, rng = np.random.default_rng(step), np.random.default_rng([step, rank])
    hot = [int(expert) for expert in shared.choice(num_experts, size=2, replace=False)]
    tokens = 0 if step == 5 or (rank and step % 3 == rank % 3) else int(rng.integers(1, 60))
    return routed_tokens(rng, tokens, num_experts, hot, float(shared.random()))


def _decide(placement: Placement, counts_QE: Counts) -> Plan:
    counts_RE = np.zeros((placement.ep_size, placement.num_experts), np.int64)
    counts_RE[: len(counts_QE)] = counts_QE
    settings = Settings(min_chunk_tokens=1, imbalance_threshold=1.05)
    plan = decide(settings, Step("prefill", 10_000), 0, counts_RE, placement, 4096)
    check_plan(plan, counts_RE.sum(axis=0).tolist())
    return plan
