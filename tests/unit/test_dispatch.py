"""Index arithmetic of dispatch, by properties: what is sent is what is received, every pair exactly once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from llep.moe.dispatch import dispatch, ranges, segment_shares, share, slots_of
from llep.placement import Placement
from llep.plan import Plan
from llep.planning import PlanOptions, plan_step

Counts = npt.NDArray[np.int64]


@st.composite
def planned(draw: st.DrawFn) -> tuple[Plan, Counts, list[int]]:
    """A plan that often lends, the counts it is made for, and the row of each expert in its home rank's weights."""
    ep_size = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, 9))
    home_rank = tuple(draw(st.lists(st.integers(0, ep_size - 1), min_size=num_experts, max_size=num_experts)))
    rows = st.lists(st.integers(0, 30), min_size=num_experts, max_size=num_experts)
    counts = np.array(draw(st.lists(rows, min_size=ep_size, max_size=ep_size)), dtype=np.int64)
    placement = Placement(home_rank, (draw(st.integers(0, min(3, num_experts))),) * ep_size)
    plan = plan_step("least_loaded", counts, placement, PlanOptions(min_chunk_tokens=1, imbalance_threshold=1.0))
    local_ids = [sum(home_rank[o] == home_rank[e] for o in range(e)) for e in range(num_experts)]
    return plan, counts, local_ids


def expert_of_row(plan: Plan, rank: int, local_ids: list[int], row: int, is_lent: bool) -> int:
    if is_lent:
        return next(expert for expert, slot in slots_of(plan, rank).items() if slot == row)
    home = plan.placement.home_rank
    return next(expert for expert in range(len(home)) if home[expert] == rank and local_ids[expert] == row)


@given(planned())
def test_what_is_sent_is_what_is_received_and_computed_once(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts, local_ids = case
    ep_size, num_experts = counts.shape
    parts = [dispatch(plan, counts, rank, local_ids) for rank in range(ep_size)]
    # Each pair carries its (source, expert, place among the source's pairs of that expert).
    sorted_pairs = [[(src, e, n) for e in range(num_experts) for n in range(counts[src, e])] for src in range(ep_size)]
    sent = [[sorted_pairs[src][i] for i in parts[src].send_order] for src in range(ep_size)]
    computed = []
    for rank in range(ep_size):
        received = []
        for src in range(ep_size):
            assert parts[src].send_counts[rank] == parts[rank].receive_counts[src]
            first = sum(parts[src].send_counts[:rank])
            received += sent[src][first : first + parts[src].send_counts[rank]]
        for rows, is_lent in ((parts[rank].home, False), (parts[rank].lent, True)):
            for position, row in zip(rows.positions, rows.experts, strict=True):
                expert = expert_of_row(plan, rank, local_ids, int(row), is_lent)
                assert received[position][1] == expert
                computed.append(received[position])
    assert sorted(computed) == sorted(pair for pairs in sorted_pairs for pair in pairs)


@given(planned())
def test_replicated_pairs_are_shared_out_once(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts, local_ids = case
    counts_E = counts.sum(axis=0)
    experts = np.repeat(np.arange(len(counts_E)), counts_E)
    seen = []
    for rank in range(plan.placement.ep_size):
        for rows, is_lent in zip(share(plan, counts_E, rank, local_ids), (False, True), strict=True):
            for position, row in zip(rows.positions, rows.experts, strict=True):
                assert experts[position] == expert_of_row(plan, rank, local_ids, int(row), is_lent)
                seen.append(int(position))
    assert sorted(seen) == list(range(len(experts)))


@given(planned())
def test_shares_of_segments_add_up_to_the_segments(case: tuple[Plan, Counts, list[int]]) -> None:
    plan, counts, _ = case
    if plan.segments:
        _, lengths = segment_shares(plan, counts)
        assert lengths.sum(axis=1).tolist() == [segment.stop - segment.start for segment in plan.segments]


def test_ranges_concatenates() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
