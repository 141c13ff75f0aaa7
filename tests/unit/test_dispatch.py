"""Index arithmetic of dispatch, by properties: what is sent is what is received, every pair exactly once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from llep.moe.dispatch import Banks, Rows, Shares, ranges, slots_of
from llep.placement import Placement
from llep.plan import Plan
from llep.planning import PlanOptions, plan_step

Counts = npt.NDArray[np.int64]


@st.composite
def planned(draw: st.DrawFn) -> tuple[Plan, Counts, list[int]]:
    """A plan that lends or uses replicas, the counts [R, B, E] it is for, each expert's row in its home's weights."""
    ep_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, 9))
    home_rank = tuple(draw(st.lists(st.integers(0, ep_size - 1), min_size=num_experts, max_size=num_experts)))
    size = ep_size * num_blocks * num_experts
    counts = np.array(draw(st.lists(st.integers(0, 30), min_size=size, max_size=size)), dtype=np.int64)
    counts = counts.reshape(ep_size, num_blocks, num_experts)
    away = [(e, r) for e in range(num_experts) for r in range(ep_size) if r != home_rank[e]]
    replicas = draw(st.lists(st.sampled_from(away), unique=True, max_size=4)) if away else []
    placement = Placement(home_rank, (draw(st.integers(0, min(3, num_experts))),) * ep_size, tuple(replicas))
    options = PlanOptions(min_chunk_tokens=1, imbalance_threshold=1.0)
    plan = plan_step("least_loaded", counts.sum(axis=1), placement, options)
    local_ids = [sum(home_rank[o] == home_rank[e] for o in range(e)) for e in range(num_experts)]
    return plan, counts, local_ids


def resident_rows(plan: Plan, rank: int) -> dict[int, int]:
    """The replicas of a rank, the last one first."""
    mine = [expert for expert, owner in plan.placement.replicas if owner == rank]
    return {expert: row for row, expert in enumerate(reversed(mine))}


def expert_of_row(plan: Plan, rank: int, local_ids: list[int], row: int, bank: str) -> int:
    rows_of = {"lent": slots_of(plan, rank), "resident": resident_rows(plan, rank)}
    if bank in rows_of:
        return next(expert for expert, slot in rows_of[bank].items() if slot == row)
    home = plan.placement.home_rank
    return next(expert for expert in range(len(home)) if home[expert] == rank and local_ids[expert] == row)


def pairs_of(rows: Rows) -> list[tuple[int, int]]:
    """(position, row of the bank) of each pair."""
    return list(zip(rows.positions_P.tolist(), np.repeat(rows.experts_G, rows.counts_G).tolist(), strict=True))


@given(planned())
def test_what_is_sent_is_what_is_received_and_computed_once(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts_RBE, local_ids = case
    ep_size, num_blocks, num_experts = counts_RBE.shape
    shares = Shares.of(plan, counts_RBE.reshape(-1, num_experts), top_k=1)
    computed = []
    for block in range(num_blocks):
        parts = [shares.dispatch(rank, block, local_ids, resident_rows(plan, rank)) for rank in range(ep_size)]
        # Each pair has a name: (source, expert, place among the source's pairs of that expert in this block).
        names = [
            [(src, e, n) for e in range(num_experts) for n in range(counts_RBE[src, block, e])]
            for src in range(ep_size)
        ]
        sent = [[names[src][i] for i in parts[src].send_order] for src in range(ep_size)]
        for rank in range(ep_size):
            received = []
            for src in range(ep_size):
                assert parts[src].pairs_to[rank] == parts[rank].pairs_from[src]
                assert parts[src].rows_to[rank] == parts[rank].rows_from[src] <= parts[src].pairs_to[rank]
                first = sum(parts[src].pairs_to[:rank])
                received += sent[src][first : first + parts[src].pairs_to[rank]]
            for banks, at_hand in ((parts[rank].own, names[rank]), (parts[rank].arrived, received)):
                for bank, rows in zip(Banks._fields, banks, strict=True):
                    for position, row in pairs_of(rows):
                        assert at_hand[position][1] == expert_of_row(plan, rank, local_ids, row, bank)
                        computed.append((block, *at_hand[position]))
            assert parts[rank].pairs_to[rank] == 0
    assert len(computed) == len(set(computed)) == counts_RBE.sum()


@given(planned())
def test_replicated_pairs_are_shared_out_once(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts_RBE, local_ids = case
    counts_E = counts_RBE.sum(axis=(0, 1))
    experts = np.repeat(np.arange(len(counts_E)), counts_E)
    shares = Shares.of(plan, counts_E[None], top_k=1)
    seen = []
    for rank in range(plan.placement.ep_size):
        banks = shares.own(rank, 0, local_ids, resident_rows(plan, rank))
        for bank, rows in zip(Banks._fields, banks, strict=True):
            for position, row in pairs_of(rows):
                assert experts[position] == expert_of_row(plan, rank, local_ids, row, bank)
                seen.append(position)
    assert sorted(seen) == list(range(len(experts)))


@given(planned(), st.integers(1, 12))
def test_chunks_are_the_rows_in_parts(case: tuple[Plan, Counts, list[int]], most_rows: int) -> None:
    plan, counts_RBE, local_ids = case
    counts_E = counts_RBE.sum(axis=(0, 1))
    home, _, _ = Shares.of(plan, counts_E[None], top_k=1).own(0, 0, local_ids)
    parts = list(home.chunks(most_rows))
    assert [pair for part in parts for pair in pairs_of(part)] == pairs_of(home)
    assert all(0 < len(part) == part.counts_G.sum() <= most_rows and part.counts_G.min() > 0 for part in parts)


@given(planned())
def test_shares_of_segments_add_up_to_the_segments(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts_RBE, _ = case
    shares = Shares.of(plan, counts_RBE.reshape(-1, counts_RBE.shape[-1]), top_k=1)
    assert shares.lengths_SQ.sum(axis=1).tolist() == [segment.stop - segment.start for segment in plan.segments]
    rows = shares.pairs_RQ.reshape(len(counts_RBE), *counts_RBE.shape[:2]).sum(axis=2)
    np.fill_diagonal(rows, 0)
    one = Shares.of(plan, counts_RBE.sum(axis=1), top_k=1)
    assert one.most_rows() == max(rows.sum(axis=0).max(initial=0), rows.sum(axis=1).max(initial=0))


def test_ranges_concatenates() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
