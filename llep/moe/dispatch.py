"""From a plan to index lists: which pairs travel where, and which rows a rank computes with which weights.

Pure index arithmetic on the host. A *pair* is one (token, k) of the router's choice; pairs sorted by expert, and by
token within an expert, are in the plan's order. Shape letters: S segments, Q sources (ranks whose tokens differ),
R ranks, E experts.

Legend of orders: a source sends its rows by (destination, segment); a rank receives rows by (source, segment).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.plan import Plan

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that one rank computes: `positions` among what it holds, `experts` the row in the bank of weights.

    Both are int64 of equal length; a bank is the rank's own weights or its lending pool.
    """

    positions: Index
    experts: Index

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One rank's part of a plan.

    send_order: positions, in this source's expert-sorted pairs, of the rows it sends, by (destination, segment).
    send_counts, receive_counts: rows to and from each rank. home, lent: received rows by the weights they need.
    """

    send_order: Index
    send_counts: list[int]
    receive_counts: list[int]
    home: Rows
    lent: Rows


def segment_shares(plan: Plan, counts_QE: Index) -> tuple[Index, Index]:
    """How each segment falls on the sources: (starts_SQ, lengths_SQ), starts counted within the source's own pairs."""
    segments = np.array([tuple(s) for s in plan.segments], dtype=np.int64).reshape(-1, 4)
    experts, starts, stops = segments[:, 0], segments[:, 2], segments[:, 3]
    ends_QE = np.cumsum(counts_QE, axis=0)
    source_stops_SQ = ends_QE.T[experts]
    source_starts_SQ = source_stops_SQ - counts_QE.T[experts]
    low_SQ = np.maximum(starts[:, None], source_starts_SQ)
    high_SQ = np.minimum(stops[:, None], source_stops_SQ)
    return low_SQ - source_starts_SQ, np.maximum(high_SQ - low_SQ, 0)


def ranges(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Index:
    """The concatenation of [start, start + length) for each pair of entries."""
    total = int(lengths.sum())
    if not total:
        return np.zeros(0, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    index: Index = np.arange(total, dtype=np.int64) + np.repeat(starts - before, lengths)
    return index


def dispatch(plan: Plan, counts_RE: Index, rank: int, local_ids: Sequence[int]) -> Dispatch:
    """This rank's part where each rank holds its own tokens (data-parallel attention).

    counts_RE: pairs routed by each rank to each expert. local_ids[expert]: the expert's row in its home rank's weights.
    """
    starts_SR, lengths_SR = segment_shares(plan, counts_RE)
    segment_ranks = np.array([s.rank for s in plan.segments], dtype=np.int64)
    segment_experts = np.array([s.expert for s in plan.segments], dtype=np.int64)
    own_offsets = np.cumsum(counts_RE[rank]) - counts_RE[rank]
    by_destination = np.argsort(segment_ranks, kind="stable")
    send_lengths = lengths_SR[by_destination, rank]
    send_starts = own_offsets[segment_experts[by_destination]] + starts_SR[by_destination, rank]
    ep_size = plan.placement.ep_size
    send_counts = np.bincount(segment_ranks, weights=lengths_SR[:, rank], minlength=ep_size)
    mine = segment_ranks == rank
    received_RS = lengths_SR[mine].T
    home, lent = _rows_by_bank(plan, rank, local_ids, segment_experts[mine], received_RS)
    return Dispatch(
        send_order=ranges(send_starts, send_lengths),
        send_counts=[int(n) for n in send_counts],
        receive_counts=[int(n) for n in received_RS.sum(axis=1)],
        home=home,
        lent=lent,
    )


def share(plan: Plan, counts_E: Index, rank: int, local_ids: Sequence[int]) -> tuple[Rows, Rows]:
    """This rank's (home, lent) rows where every rank holds all tokens (tensor-parallel attention); nothing travels.

    Positions are in the expert-sorted pairs that all ranks hold alike.
    """
    segments = [segment for segment in plan.segments if segment.rank == rank]
    offsets = np.cumsum(counts_E) - counts_E
    experts = np.array([s.expert for s in segments], dtype=np.int64)
    starts = offsets[experts] + np.array([s.start for s in segments], dtype=np.int64)
    lengths = np.array([s.stop - s.start for s in segments], dtype=np.int64)
    return _split_by_bank(plan, rank, local_ids, experts, starts, lengths)


def slots_of(plan: Plan, rank: int) -> dict[int, int]:
    """expert -> slot of this rank's lending pool: slots are filled in the order of the plan's lends."""
    return {lend.expert: slot for slot, lend in enumerate(lend for lend in plan.lends if lend.dst_rank == rank)}


def _rows_by_bank(
    plan: Plan, rank: int, local_ids: Sequence[int], experts_S: Index, received_RS: Index
) -> tuple[Rows, Rows]:
    lengths = received_RS.reshape(-1)
    starts = np.cumsum(lengths) - lengths
    return _split_by_bank(plan, rank, local_ids, np.tile(experts_S, received_RS.shape[0]), starts, lengths)


def _split_by_bank(
    plan: Plan, rank: int, local_ids: Sequence[int], experts: Index, starts: Index, lengths: Index
) -> tuple[Rows, Rows]:
    slots = slots_of(plan, rank)
    is_lent = np.array([int(e) in slots for e in experts], dtype=bool)
    rows = np.array([slots.get(int(e), local_ids[int(e)]) for e in experts], dtype=np.int64)
    home, lent = (
        Rows(ranges(starts[bank], lengths[bank]), np.repeat(rows[bank], lengths[bank])) for bank in (~is_lent, is_lent)
    )
    return home, lent
