"""What other systems would plan, for comparison: pure functions from one batch's loads to a plan.

Written from their descriptions. EPLB and LPLB share an expert's tokens over static copies, MoonEP balances exactly, and
the optimum is found by mixed-integer programming, which takes seconds: for small cases.

Shape letters: E experts, R ranks, N (expert, rank) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array

from llep.loads import home_loads
from llep.placement import Placement
from llep.plan import Decision, Plan, node_of
from llep.planning.home import plan_home
from llep.planning.options import NO_LIMIT, PlanOptions, lend_slots, max_lends, refusal

Ids = npt.NDArray[np.int64]


class Copies(NamedTuple):
    """The copies of all experts as static slots hold them: in increasing (expert, rank), doubles on a rank kept."""

    expert_N: Ids
    rank_N: Ids
    place_N: Ids  # 0, 1, ... among the expert's copies
    of_expert_N: Ids  # how many the expert has
    placement: Placement


def copies_of(slot_experts: Ids, num_experts: int, num_ranks: int) -> Copies:
    """Copies from what the slots hold, rank 0's first, equally many per rank, as `eplb.plan_eplb` says it."""
    rank_N = np.arange(len(slot_experts)) // (len(slot_experts) // num_ranks)
    order = np.lexsort((rank_N, slot_experts))
    expert_N, rank_N = slot_experts[order], rank_N[order]
    home_E = rank_N[np.searchsorted(expert_N, np.arange(num_experts))]
    pairs = set(zip(expert_N.tolist(), rank_N.tolist(), strict=True)) - set(enumerate(home_E.tolist()))
    placement = Placement(tuple(home_E.tolist()), (0,) * num_ranks, tuple(sorted(pairs)))
    return _copies(expert_N, rank_N, placement)


def holders_of(placement: Placement) -> Copies:
    """Home ranks and resident replicas as copies."""
    pairs = sorted([*enumerate(placement.home_rank), *placement.replicas])
    expert_N, rank_N = np.array(pairs, dtype=np.int64).T
    return _copies(expert_N, rank_N, placement)


def _copies(expert_N: Ids, rank_N: Ids, placement: Placement) -> Copies:
    counts_E = np.bincount(expert_N, minlength=placement.num_experts)
    first_E = np.cumsum(counts_E) - counts_E
    return Copies(expert_N, rank_N, np.arange(len(expert_N)) - first_E[expert_N], counts_E[expert_N], placement)


def plan_even_split(tokens_E: Ids, copies: Copies) -> Plan:
    """EPLB: every copy of an expert computes the same number of its tokens."""
    tokens_N = tokens_E[copies.expert_N]
    start_N = tokens_N * copies.place_N // copies.of_expert_N
    stop_N = tokens_N * (copies.place_N + 1) // copies.of_expert_N
    segments_S4 = np.stack([copies.expert_N, copies.rank_N, start_N, stop_N], axis=1)[stop_N > start_N]
    return Plan(Decision.REPLICA, copies.placement, segments_S4)


def plan_lp_split(tokens_E: Ids, copies: Copies) -> Plan:
    """LPLB: tokens over static copies so that the highest rank load is least, by linear programming."""
    is_split_N = copies.of_expert_N > 1
    num_ranks = copies.placement.ep_size
    fixed_R = np.bincount(copies.rank_N[~is_split_N], tokens_E[copies.expert_N[~is_split_N]], num_ranks)
    expert_N, rank_N = copies.expert_N[is_split_N], copies.rank_N[is_split_N]
    columns, ones = np.arange(len(expert_N)), np.ones(len(expert_N))
    split_experts, row_N = np.unique(expert_N, return_inverse=True)
    share_N = tokens_E[copies.expert_N].astype(np.float64)
    if len(expert_N):
        per_rank = coo_array(
            (
                np.append(ones, -np.ones(num_ranks)),
                (np.append(rank_N, np.arange(num_ranks)), np.append(columns, [len(columns)] * num_ranks)),
            )
        )
        per_expert = coo_array((ones, (row_N, columns)), shape=(len(split_experts), len(columns) + 1))
        cost = np.append(np.zeros(len(columns)), 1.0)
        found = linprog(
            cost, A_ub=per_rank.tocsr(), b_ub=-fixed_R, A_eq=per_expert.tocsr(), b_eq=tokens_E[split_experts]
        )
        assert found.success, found.message
        share_N[is_split_N] = found.x[:-1]
    return Plan(Decision.REPLICA, copies.placement, _segments(copies.expert_N, copies.rank_N, share_N, tokens_E))


def plan_exact(tokens_E: Ids, placement: Placement) -> Plan:
    """MoonEP's scheme: every rank computes the mean load, up to one token. No limit of slots or bytes is kept.

    The rank that has least below the mean is filled up by the one that has most above it, again and again, so each
    rank borrows from one other. Which experts: the widest gap takes from the largest that is left.
    """
    num_ranks = placement.ep_size
    loads = home_loads(tokens_E, placement.home_rank, num_ranks)
    base, extra = divmod(sum(loads), num_ranks)
    surplus = [load - base - (rank < extra) for rank, load in enumerate(loads)]
    gaps: dict[int, list[tuple[int, int]]] = {}
    while min(surplus) < 0:
        src, dst = surplus.index(max(surplus)), surplus.index(min(surplus))
        gaps.setdefault(src, []).append((-surplus[dst], dst))
        surplus[src] += surplus[dst]
        surplus[dst] = 0
    left_E = tokens_E.tolist()
    moved: list[tuple[int, int, int]] = []
    for src, wanted in gaps.items():
        experts = [expert for expert, home in enumerate(placement.home_rank) if home == src]
        for gap, dst in sorted(wanted, key=lambda entry: (-entry[0], entry[1])):
            while gap:
                expert = max(experts, key=left_E.__getitem__)
                count = min(gap, left_E[expert])
                moved.append((expert, dst, count))
                left_E[expert] -= count
                gap -= count
    if not moved:
        return plan_home(tokens_E.tolist(), placement, Decision.BALANCED)
    kept = [(expert, home, left_E[expert]) for expert, home in enumerate(placement.home_rank)]
    expert_N, rank_N, count_N = np.array(kept + moved, dtype=np.int64).T
    return Plan(Decision.LEND, placement, _segments(expert_N, rank_N, count_N.astype(np.float64), tokens_E))


class Optimum(NamedTuple):
    """The best plan found. gap: how far above the least there is its highest load may be, as a share; 0 is proof."""

    plan: Plan
    gap: float


def plan_optimum(
    tokens_E: Sequence[int] | Ids, placement: Placement, options: PlanOptions, time_limit_s: float = 60.0
) -> Optimum:
    """The least highest load within slots, bytes and scope, then the fewest lends that reach it, by HiGHS.

    Takes no notice of the threshold, of alpha, of m and of costs. Resident replicas are used.
    """
    tokens_E = np.asarray(tokens_E, dtype=np.int64)
    if not tokens_E.any():
        return Optimum(plan_home(tokens_E.tolist(), placement, Decision.BALANCED), 0.0)
    problem = _Problem(tokens_E, placement, options)
    lowest = problem.solve(highest=None, time_limit_s=time_limit_s)
    if lowest is None:
        return Optimum(plan_home(tokens_E.tolist(), placement, Decision.ERROR), 1.0)
    shares, gap = lowest
    fewest = problem.solve(highest=problem.highest_load(shares), time_limit_s=time_limit_s)
    segments_S4 = problem.segments(fewest[0] if fewest is not None else shares)
    plan = Plan(Decision.LEND, placement, segments_S4, ranks_per_node=options.ranks_per_node)
    if not plan.lends:
        plain = home_loads(tokens_E, placement.home_rank, placement.ep_size)
        decision = Decision.REPLICA if placement.replicas else refusal(plain, placement, options)
        plan = Plan(decision, placement, segments_S4, ranks_per_node=options.ranks_per_node)
    return Optimum(plan, gap)


class _Problem:
    """Variables: tokens of every allowed (expert, rank), whether a lend carries them, and the highest load."""

    def __init__(self, tokens_E: Ids, placement: Placement, options: PlanOptions) -> None:
        self._tokens_E, self._placement = tokens_E, placement
        per_node = options.ranks_per_node
        pairs = [
            (expert, rank, rank not in placement.holders[expert])
            for expert in np.flatnonzero(tokens_E).tolist()
            for rank in range(placement.ep_size)
            if rank in placement.holders[expert]
            or options.lend_scope == "any"
            or node_of(rank, per_node) in {node_of(holder, per_node) for holder in placement.holders[expert]}
        ]
        self.expert_N, self.rank_N, is_lend_N = (np.array(column) for column in zip(*pairs, strict=True))
        self._lends = np.flatnonzero(is_lend_N)
        home_at = {expert: at for at, (expert, rank, _) in enumerate(pairs) if rank == placement.home_rank[expert]}
        self._home_N = np.array([home_at[expert] for expert, _, _ in pairs])  # where each pair's expert is at home
        self._slots, self._max_lends = lend_slots(placement, options), max_lends(options)
        self._size = len(pairs) + len(self._lends) + 1

    def highest_load(self, shares: Ids) -> int:
        return int(np.bincount(self.rank_N, shares, self._placement.ep_size).max())

    def segments(self, shares: Ids) -> Ids:
        return _segments(self.expert_N, self.rank_N, shares.astype(np.float64), self._tokens_E)

    def solve(self, highest: int | None, time_limit_s: float) -> tuple[Ids, float] | None:
        """Tokens [N] of each pair: least highest load, or (given it) fewest lends; and the gap. None: nothing found."""
        pairs, lends = len(self.expert_N), len(self._lends)
        cost = np.zeros(self._size)
        upper = np.concatenate([self._tokens_E[self.expert_N], np.ones(lends), [self._tokens_E.sum()]])
        if highest is None:
            cost[-1] = 1.0
        else:
            cost[pairs : pairs + lends] = 1.0
            upper[-1] = highest
        found = milp(
            cost,
            constraints=self._constraints(),
            integrality=np.ones(self._size),
            bounds=Bounds(0, upper),
            options={"time_limit": time_limit_s},
        )
        if found.x is None:
            return None
        shares_N = np.rint(found.x[:pairs]).astype(np.int64)
        # A lend that is almost 0 to the solver may carry a few of very many tokens: they stay at home.
        not_lent = self._lends[found.x[pairs : pairs + lends] < 0.5]
        np.add.at(shares_N, self._home_N[not_lent], shares_N[not_lent])
        shares_N[not_lent] = 0
        return shares_N, float(found.mip_gap or 0.0)

    def _constraints(self) -> list[LinearConstraint]:
        pairs, lends, ranks = len(self.expert_N), len(self._lends), self._placement.ep_size
        at = np.arange(pairs)
        experts, row_N = np.unique(self.expert_N, return_inverse=True)
        every_token = self._rows(row_N, at, np.ones(pairs), len(experts))
        load = self._rows(
            np.append(self.rank_N, np.arange(ranks)),
            np.append(at, [self._size - 1] * ranks),
            np.append(np.ones(pairs), -np.ones(ranks)),
            ranks,
        )
        lent = pairs + np.arange(lends)
        only_lent = self._rows(
            np.tile(np.arange(lends), 2),
            np.append(self._lends, lent),
            np.append(np.ones(lends), -self._tokens_E[self.expert_N[self._lends]]),
            lends,
        )
        slots = self._rows(self.rank_N[self._lends], lent, np.ones(lends), ranks)
        all_lends = self._rows(np.zeros(lends, dtype=np.int64), lent, np.ones(lends), 1)
        tokens = self._tokens_E[experts]
        return [
            LinearConstraint(every_token, tokens, tokens),
            LinearConstraint(load, -np.inf, 0.0),
            LinearConstraint(only_lent, -np.inf, 0.0),
            LinearConstraint(slots, -np.inf, self._slots),
            LinearConstraint(all_lends, -np.inf, min(self._max_lends, NO_LIMIT)),
        ]

    def _rows(self, rows: Ids, columns: Ids, values: npt.NDArray[np.float64], count: int) -> csr_array:
        return coo_array((values, (rows, columns)), shape=(count, self._size)).tocsr()


def _segments(expert_N: Ids, rank_N: Ids, share_N: npt.NDArray[np.float64], tokens_E: Ids) -> Ids:
    """Segments [S, 4] that give each pair its share, rounded so that each expert's add up to its tokens."""
    order = np.lexsort((rank_N, expert_N))
    expert_N, rank_N = expert_N[order], rank_N[order]
    # Cutting at the rounded running sums: no pair is off by more than a token, and the last cut is the expert's end.
    ends_N = np.cumsum(share_N[order])
    offset_E = np.cumsum(tokens_E) - tokens_E
    stop_N = np.rint(ends_N).astype(np.int64) - offset_E[expert_N]
    is_last_N = np.append(expert_N[1:] != expert_N[:-1], True)
    stop_N[is_last_N] = tokens_E[expert_N[is_last_N]]
    stop_N = np.clip(stop_N, 0, tokens_E[expert_N])
    start_N = np.where(np.append(True, is_last_N[:-1]), 0, np.append(0, stop_N[:-1]))
    segments_S4: Ids = np.stack([expert_N, rank_N, start_N, stop_N], axis=1)[stop_N > start_N]
    return segments_S4
