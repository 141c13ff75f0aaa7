"""From a plan to index lists: which pairs and token rows travel where, and what a rank computes with which weights.

Pure index arithmetic on the host. A *pair* is one (token, k) of the router's choice; pairs sorted by expert, and by
token within an expert, are in the plan's order. Where a batch does not fit the workspace, each source's tokens are cut
into blocks that are computed one after the other.

Shape letters: S segments, R ranks, B blocks, E experts, Q sources' blocks (R x B, a source's blocks in order), P pairs,
G groups of pairs that share an expert.

Orders: a source sends its pairs by (destination, segment); a rank receives them by (source, segment).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llep.plan import Plan

Index = npt.NDArray[np.int64]

_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Rows:
    """Pairs that one rank computes with one bank of weights (its own experts', its resident replicas or its lending
    pool), expert by expert.

    positions_P: places among the pairs at hand. experts_G, counts_G: rows of the bank, each once and increasing, and
    how many of the pairs belong to each, at least one.
    """

    positions_P: Index
    experts_G: Index
    counts_G: Index

    def __len__(self) -> int:
        return len(self.positions_P)

    def chunks(self, most_rows: int) -> Iterator[Rows]:
        """These rows in parts of at most most_rows, about equally large."""
        if len(self) <= most_rows:
            if len(self):
                yield self
            return
        stops_G = np.cumsum(self.counts_G)
        bounds = np.linspace(0, len(self), -(-len(self) // most_rows) + 1).astype(np.int64).tolist()
        for start, stop in pairwise(bounds):
            counts_G = np.minimum(stops_G, stop) - np.maximum(stops_G - self.counts_G, start)
            used = counts_G > 0
            yield Rows(self.positions_P[start:stop], self.experts_G[used], counts_G[used])

    def of_experts(self, is_taken_G: npt.NDArray[np.bool_]) -> Rows:
        """Those of some of its experts."""
        taken_P = np.repeat(is_taken_G, self.counts_G)
        return Rows(self.positions_P[taken_P], self.experts_G[is_taken_G], self.counts_G[is_taken_G])

    def joined(self, other: Rows) -> Rows:
        """These and other rows of the same bank; those of one expert together, these first."""
        experts_P = np.concatenate([np.repeat(rows.experts_G, rows.counts_G) for rows in (self, other)])
        experts_G, counts_G = np.unique(experts_P, return_counts=True)
        order_P = np.argsort(experts_P, kind="stable")
        return Rows(np.concatenate((self.positions_P, other.positions_P))[order_P], experts_G, counts_G)


class Banks(NamedTuple):
    """Rows by the weights that they need."""

    home: Rows
    resident: Rows
    lent: Rows


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One rank's part in one block of a plan.

    own: rows among its own expert-sorted pairs, which it computes itself. arrived: rows among the pairs it receives.
    send_order: places, among its own expert-sorted pairs, of those it sends away, by (destination, segment).
    pairs_to, pairs_from: how many pairs, per rank; none to itself. rows_to, rows_from: how many token rows, at most:
    a token goes to a rank once, so a rank's tokens and its pairs limit them, and all ranks know both.
    """

    own: Banks
    arrived: Banks
    send_order: Index
    pairs_to: list[int]
    pairs_from: list[int]
    rows_to: list[int]
    rows_from: list[int]


@dataclass(frozen=True)
class Shares:
    """How a plan's segments fall on the sources' blocks.

    starts_SQ: places within the block's own pairs of the segment's expert; lengths_SQ pairs; tokens_Q of each block.
    """

    plan: Plan
    counts_QE: Index
    starts_SQ: Index
    lengths_SQ: Index
    tokens_Q: Index

    @classmethod
    def of(cls, plan: Plan, counts_QE: Index, top_k: int) -> Shares:
        """counts_QE: pairs of each source's block for each expert; tokens have top_k pairs each."""
        experts_S, _, start_S, stop_S = plan.segments_S4.T
        stops_SQ = np.cumsum(counts_QE, axis=0).T[experts_S]
        starts_SQ = stops_SQ - counts_QE.T[experts_S]
        low_SQ = np.maximum(start_S[:, None], starts_SQ)
        high_SQ = np.minimum(stop_S[:, None], stops_SQ)
        tokens_Q = counts_QE.sum(axis=1) // top_k
        return cls(plan, counts_QE, low_SQ - starts_SQ, np.maximum(high_SQ - low_SQ, 0), tokens_Q)

    @cached_property
    def by_rank_S(self) -> Index:
        """Segments sorted by rank, and by number within a rank."""
        order_S: Index = np.argsort(self.plan.segments_S4[:, 1], kind="stable")
        return order_S

    @cached_property
    def starts_R(self) -> Index:
        """Where each rank's segments begin in by_rank_S, and at the end where all end: [R + 1]."""
        ranks_S = self.plan.segments_S4[self.by_rank_S, 1]
        return np.searchsorted(ranks_S, np.arange(self.plan.placement.ep_size + 1))

    @cached_property
    def pairs_RQ(self) -> Index:
        """Pairs that each rank computes of each source's block."""
        sums_SQ = np.zeros((len(self.lengths_SQ) + 1, len(self.tokens_Q)), dtype=np.int64)
        np.cumsum(self.lengths_SQ[self.by_rank_S], axis=0, out=sums_SQ[1:])
        return np.diff(sums_SQ[self.starts_R], axis=0)

    def segments_of(self, rank: int) -> Index:
        return self.by_rank_S[self.starts_R[rank] : self.starts_R[rank + 1]]

    def most_rows(self) -> int:
        """The most token rows that any rank sends, or receives, if there is one block for each source."""
        rows_RR = np.minimum(self.pairs_RQ, self.tokens_Q)
        np.fill_diagonal(rows_RR, 0)
        return int(max(rows_RR.sum(axis=0).max(initial=0), rows_RR.sum(axis=1).max(initial=0)))

    def own(self, rank: int, q: int, local_ids: Sequence[int], resident_rows: Mapping[int, int] = _NONE) -> Banks:
        """What `rank` computes of the pairs of source block q, which it holds."""
        mine = self.segments_of(rank)
        experts = self.plan.segments_S4[mine, 0]
        offsets_E = np.cumsum(self.counts_QE[q]) - self.counts_QE[q]
        starts = offsets_E[experts] + self.starts_SQ[mine, q]
        return _by_bank(self.plan, rank, local_ids, resident_rows, experts, starts, self.lengths_SQ[mine, q])

    def dispatch(
        self, rank: int, block: int, local_ids: Sequence[int], resident_rows: Mapping[int, int] = _NONE
    ) -> Dispatch:
        """The part of `rank` in this block.

        local_ids[expert]: the expert's row in its home rank's weights; resident_rows[expert]: its replica's row here.
        """
        ep_size = self.plan.placement.ep_size
        blocks = len(self.tokens_Q) // ep_size
        at_R = np.arange(ep_size) * blocks + block
        others_R = np.arange(ep_size) != rank
        pairs_RR = self.pairs_RQ[:, at_R]
        pairs_to, pairs_from = pairs_RR[:, rank] * others_R, pairs_RR[rank] * others_R
        return Dispatch(
            own=self.own(rank, int(at_R[rank]), local_ids, resident_rows),
            arrived=self._arrived(rank, at_R[others_R], local_ids, resident_rows),
            send_order=self._send_order(rank, int(at_R[rank])),
            pairs_to=pairs_to.tolist(),
            pairs_from=pairs_from.tolist(),
            rows_to=np.minimum(pairs_to, self.tokens_Q[at_R[rank]]).tolist(),
            rows_from=np.minimum(pairs_from, self.tokens_Q[at_R]).tolist(),
        )

    def _send_order(self, rank: int, q: int) -> Index:
        offsets_E = np.cumsum(self.counts_QE[q]) - self.counts_QE[q]
        away = np.concatenate((self.by_rank_S[: self.starts_R[rank]], self.by_rank_S[self.starts_R[rank + 1] :]))
        experts = self.plan.segments_S4[away, 0]
        return ranges(offsets_E[experts] + self.starts_SQ[away, q], self.lengths_SQ[away, q])

    def _arrived(
        self, rank: int, sources_q: Index, local_ids: Sequence[int], resident_rows: Mapping[int, int]
    ) -> Banks:
        mine = self.segments_of(rank)
        lengths = self.lengths_SQ[np.ix_(mine, sources_q)].T.reshape(-1)
        experts = np.tile(self.plan.segments_S4[mine, 0], len(sources_q))
        return _by_bank(self.plan, rank, local_ids, resident_rows, experts, np.cumsum(lengths) - lengths, lengths)


def ranges(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Index:
    """The concatenation of [start, start + length) for each pair of entries."""
    total = int(lengths.sum())
    if not total:
        return np.zeros(0, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    index: Index = np.arange(total, dtype=np.int64) + np.repeat(starts - before, lengths)
    return index


def slots_of(plan: Plan, rank: int) -> dict[int, int]:
    """expert -> slot of this rank's lending pool: slots are filled in the order of the plan's lends."""
    return {lend.expert: slot for slot, lend in enumerate(lend for lend in plan.lends if lend.dst_rank == rank)}


def _by_bank(
    plan: Plan,
    rank: int,
    local_ids: Sequence[int],
    resident_rows: Mapping[int, int],
    experts: Index,
    starts: Index,
    lengths: Index,
) -> Banks:
    """Runs [start, start + length) of pairs at hand, each of one expert, as rows by the bank that `rank` has it in."""
    rows = np.asarray(local_ids, dtype=np.int64)[experts]
    slots = slots_of(plan, rank)
    if not slots and not resident_rows:
        return Banks(_rows(rows, starts, lengths), _NO_ROWS, _NO_ROWS)
    bank = np.zeros(len(experts), dtype=np.int64)
    for number, rows_of in ((1, resident_rows), (2, slots)):
        if rows_of:
            row_E = np.full(plan.placement.num_experts, -1, dtype=np.int64)
            row_E[list(rows_of)] = list(rows_of.values())
            is_there = row_E[experts] >= 0
            bank[is_there], rows[is_there] = number, row_E[experts[is_there]]
    return Banks(*(_rows(rows[bank == n], starts[bank == n], lengths[bank == n]) for n in range(3)))


_NO_ROWS = Rows(*(np.zeros(0, dtype=np.int64),) * 3)


def _rows(experts: Index, starts: Index, lengths: Index) -> Rows:
    order = np.argsort(experts, kind="stable")
    counts = np.bincount(experts, weights=lengths).astype(np.int64)
    used = np.flatnonzero(counts)
    return Rows(ranges(starts[order], lengths[order]), used, counts[used])
