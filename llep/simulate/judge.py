"""What a plan does, read off its segments: loads, lends, bytes, predicted seconds. No Python object per segment.

Shape letters: R ranks, E experts, S segments, P (expert, rank) pairs that compute something.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llep.cost import CostModel, arrivals_s
from llep.placement import Placement
from llep.plan import Plan, relay
from llep.simulate.setup import Setup
from llep.simulate.tally import Tally

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ACTIVATION_BYTES = 2  # of one number: bfloat16
MOST_PLACEMENTS = 4096  # whose holders are remembered


class Judge:
    """Adds plans to tallies, all over the same loads and at the same costs."""

    def __init__(self, setup: Setup) -> None:
        self._ranks, self._experts = setup.num_ranks, setup.shape.num_experts
        self._model, self._per_node = setup.options.cost_model, setup.options.ranks_per_node
        self._bytes = setup.bytes_per_expert
        self._pair_bytes = ACTIVATION_BYTES * (setup.shape.hidden_size + setup.shape.intermediate_size)
        self._held: dict[int, tuple[Placement, npt.NDArray[np.bool_]]] = {}

    def judge(self, tally: Tally, layer: int, plan: Plan, resident_R: Counts, *, is_planned: bool) -> float:
        """Add a plan to the tally; its imbalance ratio. is_planned: it was made for this batch, which takes time."""
        segments_S4 = plan.segments_S4
        rank_S, tokens_S = segments_S4[:, 1], segments_S4[:, 3] - segments_S4[:, 2]
        loads_R = _sums(rank_S, tokens_S, self._ranks)
        tokens = _sums(segments_S4[:, 0] * self._ranks + rank_S, tokens_S, self._experts * self._ranks)
        key_P = np.flatnonzero(tokens > 0)
        tokens_P = tokens[key_P]
        expert_P, rank_P = np.divmod(key_P, self._ranks)
        is_lent_P = ~self._holds(plan.placement)[key_P]
        is_spilled_P = rank_P != plan.placement.home_rank_E[expert_P]
        lends_R = np.bincount(rank_P[is_lent_P], minlength=self._ranks)
        used_R = (lends_R + resident_R) * self._bytes + loads_R.astype(np.int64) * self._pair_bytes
        seconds = 0.0
        if self._model is not None and plan.predicted_gain_s:
            # The planner has predicted the same already, and faster.
            tokens_E = _sums(segments_S4[:, 0], tokens_S, self._experts)
            seconds = self._home_s(plan.placement, tokens_E) - plan.predicted_gain_s
        elif self._model is not None:
            seconds = self.predicted_s(plan.placement, expert_P, rank_P, tokens_P, is_lent_P)
            seconds += self._model.plan_s if is_planned and is_spilled_P.any() else 0.0
        return tally.add(
            layer, plan.decision.value, loads_R, lends_R, used_R, float(tokens_P[is_spilled_P].sum()), seconds
        )

    def _home_s(self, placement: Placement, tokens_E: Floats) -> float:
        experts = np.flatnonzero(tokens_E > 0)
        nothing_lent = np.zeros(len(experts), dtype=bool)
        return self.predicted_s(placement, experts, placement.home_rank_E[experts], tokens_E[experts], nothing_lent)

    def predicted_s(
        self, placement: Placement, expert_P: Counts, rank_P: Counts, tokens_P: Floats, is_lent_P: npt.NDArray[np.bool_]
    ) -> float:
        """Seconds of one layer without planning; `cost.layer_s` over arrays, equal to it up to rounding."""
        assert self._model is not None
        seconds_P = experts_s(self._model, tokens_P, self._bytes)
        bank_P = rank_P + self._ranks * is_lent_P
        is_used = np.bincount(bank_P, minlength=2 * self._ranks) > 0
        bank_s = _sums(bank_P, seconds_P, 2 * self._ranks) + self._model.gemm_launch_s * is_used
        own_s, lent_s = bank_s[: self._ranks], bank_s[self._ranks :]
        wait_s = self._arrivals_s(placement, expert_P[is_lent_P], rank_P[is_lent_P]) - self._model.overlap_ratio * own_s
        return float((own_s + lent_s + np.maximum(wait_s, 0.0)).max())

    def _arrivals_s(self, placement: Placement, experts: Counts, ranks: Counts) -> Floats:
        assert self._model is not None
        receivers: dict[int, list[int]] = {}
        for expert, rank in zip(experts.tolist(), ranks.tolist(), strict=True):
            receivers.setdefault(expert, []).append(rank)
        hops = relay(receivers, placement, self._per_node)
        size = self._bytes or self._model.expert_bytes
        return np.array(arrivals_s(hops, self._ranks, self._per_node, self._model, size))

    def ideal_s(self, num_tokens: int) -> float:
        """Seconds of one layer were every expert equally popular and every rank equally loaded."""
        assert self._model is not None
        experts = self._experts / self._ranks
        share_s = experts_s(self._model, np.array([num_tokens / self._experts]), self._bytes)
        return float(share_s[0]) * experts + self._model.gemm_launch_s

    def _holds(self, placement: Placement) -> npt.NDArray[np.bool_]:
        """Whether each pair [experts x ranks, flat] has its weights at hand; kept for the placements of now."""
        found = self._held.get(id(placement))
        if found is not None and found[0] is placement:
            return found[1]
        if len(self._held) > MOST_PLACEMENTS:
            self._held.clear()
        holds_ER = np.zeros((self._experts, self._ranks), dtype=bool)
        holds_ER[np.arange(self._experts), placement.home_rank_E] = True
        for expert, rank in placement.replicas:
            holds_ER[expert, rank] = True
        self._held[id(placement)] = (placement, holds_ER.reshape(-1))
        return self._held[id(placement)][1]


def _sums(places: Counts, values: Counts | Floats, size: int) -> Floats:
    """Sum of the values at each place."""
    return np.asarray(np.bincount(places, values, size), dtype=np.float64)


def experts_s(model: CostModel, tokens: Floats, bytes_per_expert: int) -> Floats:
    """`CostModel.expert_s` over an array of tokens > 0."""
    at = np.maximum(np.searchsorted(model.curve_tokens, tokens, side="right") - 1, 0)
    over = np.maximum(tokens - model.curve_tokens[at], 0.0)
    scale = (bytes_per_expert or model.expert_bytes) / model.expert_bytes
    seconds: Floats = (model.curve_s[at] + model.curve_slopes[at] * over) * scale
    return seconds
