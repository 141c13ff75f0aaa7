"""The paper's least-loaded assignment (arXiv 2601.17111, Algorithms 2 and 3) under slot and byte limits: the readable
definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.plan import Decision, Plan, Segment, node_of
from llep.planning.home import plan_home
from llep.planning.options import PlanOptions, lend_slots, max_lends, refusal


def plan_least_loaded(tokens_per_expert: Sequence[int], placement: Placement, options: PlanOptions) -> Plan:
    """A plan by the paper's rule, or plain EP with the reason.

    Experts are taken in decreasing load; home keeps what fits under capacity = ceil(alpha * mean load), the rest goes
    piece by piece to the least-loaded other rank. Ties break by lowest index.

    Where the paper and the authors' code differ:
    - the threshold is on rank loads, as in their code (Algorithm 4 as printed takes expert loads);
    - a remainder below m stays at home, as in the paper's text (their code and Algorithm 3 as printed send it away);
    - the helpers are ordered anew for each piece, as in Algorithm 3 (their code orders them once in one of its cases);
    - alpha is 1.0 unless told, as in the paper's experiments (their code: 1.1).
    As in both, when no helper has room for m, the least-loaded one takes the whole remainder, whatever its capacity.
    What llep adds: only ranks with a free slot (and bytes) or a resident replica help, what nobody can take stays at
    home, and a plan whose maximum load is not below plain EP's is replaced by plain EP.
    """
    plain = home_loads(tokens_per_expert, placement.home_rank, placement.ep_size)
    if imbalance_ratio(plain) < options.imbalance_threshold or not any(tokens_per_expert):
        return plan_home(tokens_per_expert, placement, Decision.BALANCED)
    assignment = _Assignment(tokens_per_expert, plain, placement, options)
    if max(plain) <= assignment.capacity:
        return plan_home(tokens_per_expert, placement, Decision.BALANCED)
    for expert in sorted(range(len(tokens_per_expert)), key=lambda e: -tokens_per_expert[e]):
        assignment.assign(expert)
    if all(s.rank == placement.home_rank[s.expert] for s in assignment.segments):
        return plan_home(tokens_per_expert, placement, refusal(plain, placement, options))
    if max(assignment.loads) >= max(plain):
        return plan_home(tokens_per_expert, placement, Decision.NO_GAIN)
    segments = sorted(assignment.segments, key=lambda s: (s.expert, s.start))
    plan = Plan(Decision.LEND, placement, segments, ranks_per_node=options.ranks_per_node)
    if not plan.lends:
        plan.decision = Decision.REPLICA
    return plan


class _Assignment:
    """Algorithm 2's state. loads[rank] is a + p: what is assigned, plus what is still pending at home."""

    def __init__(
        self, tokens_per_expert: Sequence[int], plain: Sequence[int], placement: Placement, options: PlanOptions
    ) -> None:
        self.tokens_per_expert, self.placement, self.options = tokens_per_expert, placement, options
        self.loads = list(plain)
        self.capacity = math.ceil(options.capacity_factor * sum(plain) / len(plain))
        self.slots = lend_slots(placement, options)
        self.lends_left = max_lends(options)
        self.segments: list[Segment] = []

    def assign(self, expert: int) -> None:
        """Algorithm 2 for one expert: home keeps what fits, the rest is spilled."""
        tokens, home = self.tokens_per_expert[expert], self.placement.home_rank[expert]
        self.loads[home] -= tokens
        kept = min(tokens, max(self.capacity - self.loads[home], 0))
        shares = self._spill(expert, tokens - kept) if tokens - kept >= self.options.min_chunk_tokens else {}
        kept = tokens - sum(shares.values())
        self.loads[home] += kept
        start = 0
        for rank, count in ((home, kept), *shares.items()):
            if count:
                self.segments.append(Segment(expert, rank, start, start + count))
                start += count

    def _spill(self, expert: int, tokens: int) -> dict[int, int]:
        """Algorithm 3: tokens by helper, in the order in which helpers were chosen."""
        shares: dict[int, int] = {}
        left = tokens
        while left >= self.options.min_chunk_tokens:
            helper, count = self._choose(expert, left, shares)
            if not count:
                break
            if helper not in shares and helper not in self.placement.holders[expert]:
                self.slots[helper] -= 1
                self.lends_left -= 1
            shares[helper] = shares.get(helper, 0) + count
            self.loads[helper] += count
            left -= count
        return shares

    def _choose(self, expert: int, left: int, shares: dict[int, int]) -> tuple[int, int]:
        """The helper of the next piece and its size; size 0 when no rank may help.

        Algorithm 3 goes through the helpers by load for one with room for m: the least loaded has it, or none has.
        """
        able = [rank for rank in range(len(self.loads)) if self._may_help(expert, rank, shares)]
        if not able:
            return -1, 0
        helper = min(able, key=lambda rank: (self.loads[rank], rank))
        count = min(left, self.capacity - self.loads[helper])
        return helper, count if count >= self.options.min_chunk_tokens else left

    def _may_help(self, expert: int, rank: int, shares: dict[int, int]) -> bool:
        home, options, per_node = self.placement.home_rank[expert], self.options, self.options.ranks_per_node
        if rank == home:
            return False
        if rank in shares or rank in self.placement.holders[expert]:
            return True
        is_in_scope = options.lend_scope == "any" or node_of(rank, per_node) == node_of(home, per_node)
        return is_in_scope and self.slots[rank] > 0 and self.lends_left > 0
