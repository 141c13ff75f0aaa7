"""Whether a lending step computed what plain EP computes: a check of a share of the steps, on all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from llep.moe.layer import Counts, LayerResult, LeastLoadedMoE
from llep.plan import Plan
from llep.planning.home import plan_home

# Of the largest output: what another order of additions, and rounding to the type, may change.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples are spread evenly, whatever share is taken


@dataclass(frozen=True, slots=True)
class Verification:
    """difference: of the outputs, in parts of the largest one, over all ranks. plain: what plain EP computed."""

    difference: float
    plain: LayerResult

    @property
    def is_equal(self) -> bool:
        return self.difference <= TOLERANCES.get(self.plain.output_TH.dtype, 5e-2)


def is_sampled(step: int, ratio: float) -> bool:
    """Whether this step is one of the `ratio` of all, evenly spread, that are verified: the same on all ranks."""
    return int((step + 1) * ratio) > int(step * ratio)


def is_probe(step: int, probe_ratio: float, verify_sample_ratio: float) -> bool:
    """Whether this step is a probe, `probe_ratio` of all, in no rhythm with anything: the same on all ranks.

    A step that is verified never is: it must lend to be worth verifying.
    """
    is_chosen = step * _GOLDEN % (1 << 64) < probe_ratio * (1 << 64)
    return is_chosen and not is_sampled(step, verify_sample_ratio)


def verify(
    moe: LeastLoadedMoE,
    result: LayerResult,
    hidden_TH: torch.Tensor,
    gates_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    is_replicated: bool,
) -> Verification:
    """Compute the batch of `result` again by plain EP and compare. Every rank enters it, for the same layer."""
    plain_plan = partial(_plain_plan, moe, result.plan)
    if is_replicated:
        plain = moe.forward_replicated(hidden_TH, gates_TK, ids_TK, plain_plan, agree=True)
        outputs = torch.stack((result.output_TH, plain.output_TH))  # partial sums differ by design: their sums may not
        moe.transport.add_up(outputs, "sums to verify")
    else:
        plain = moe.forward_sharded(hidden_TH, gates_TK, ids_TK, plain_plan)
        outputs = torch.stack((result.output_TH, plain.output_TH))
    row = _difference_and_scale(outputs.to(torch.float64))
    rows_R2 = moe.transport.gather(row.to(moe.transport.device), "differences found").cpu().numpy()
    difference, scale = rows_R2.max(axis=0)
    return Verification(float(difference / scale) if scale else float(difference), plain)


def _plain_plan(moe: LeastLoadedMoE, plan: Plan, counts_QE: Counts) -> Plan:
    return plan_home(counts_QE.sum(axis=0).tolist(), plan.placement)


def _difference_and_scale(outputs_2TH: torch.Tensor) -> torch.Tensor:
    """[2]: the largest difference, infinite where only one is a number, and the largest plain output."""
    found, plain = outputs_2TH
    if not plain.numel():
        return torch.zeros(2, dtype=torch.float64, device=plain.device)
    is_same = (found == plain) | (found.isnan() & plain.isnan())
    difference = torch.where(is_same, 0.0, (found - plain).abs()).nan_to_num(nan=torch.inf)
    return torch.stack((difference.max(), plain.abs().nan_to_num(nan=0.0).max()))
