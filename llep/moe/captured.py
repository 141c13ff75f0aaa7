"""Replicas in steps that a GPU replays from a CUDA graph: no host code runs in them, nothing is planned or agreed on.

Which copy of an expert computes a pair is then read from tensors on the device, which are written before an eager step,
on all ranks before the same one (llep.moe.replicas). Every rank has all tokens, in the same order, and the copies of an
expert take their pairs in turn, the home rank's first, then by rank: each pair is computed once, by what all ranks hold
alike.

Who enters what: nothing. A map changes with the placement, and otherwise only to `home_only`, at once, when weights are
loaded or woken up; after it a rank computes its own experts alone, as without replicas, until an eager step has dropped
the copies of what was on all ranks. Tensor-parallel ranks do that between the same two steps, for one scheduler tells
them. Data-parallel ranks are told by a queue each, while steps go on: in a captured step between, where maps differ,
pairs of experts that have replicas are computed twice or not at all. No map can mend that, for who replays can't ask:
weights of a data-parallel engine are loaded while it is paused or asleep, or while no placement is live.

Shape letters: T tokens of all ranks, K top-k, H hidden, E experts, S turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from llep.placement import Placement

TURNS = 12  # after so many tokens it begins anew: 2, 3, 4, 6 or 12 copies get the same share, others nearly


class ChosenExperts(Protocol):
    """Experts that can leave pairs out without looking at them on the host."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]: ...

    def compute_chosen(
        self, bank: Mapping[str, torch.Tensor], hidden_TH: torch.Tensor, gates_TK: torch.Tensor, rows_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over k of gate x expert(hidden) -> [T, H], by row rows_TK of `bank`; nothing where that is the number of
        its rows. Kernels, their shapes and addresses depend on the arguments' shapes alone."""


class DeviceMap:
    """Of one layer on one rank: the row of each expert in this rank's weights, and in its room, by whose turn it is."""

    def __init__(
        self, home: Placement, local_ids: Sequence[int], rank: int, room_rows: int, device: torch.device
    ) -> None:
        """local_ids: the row of each expert in its home rank's weights. room_rows: how many replicas the room holds."""
        self._rank = rank
        self._home_rank_E = home.home_rank_E
        self._own_rows = int((self._home_rank_E == rank).sum())
        self._room_rows = room_rows
        is_mine_E = self._home_rank_E == rank
        own_E = np.where(is_mine_E, np.array(local_ids), self._own_rows).astype(np.int32)
        self._own_alone_SE = np.tile(own_E, (TURNS, 1))
        # First as without replicas, then as with those that act; `_first` is the place of what holds.
        self._own_SE = torch.empty((2 * TURNS, len(own_E)), dtype=torch.int32, device=device)
        self._room_SE = torch.empty_like(self._own_SE)
        self._first = torch.empty(1, dtype=torch.int32, device=device)
        self.restore()

    def follow(self, placement: Placement, row_of: Mapping[int, int]) -> None:
        """Share pairs with the placement's replicas. row_of: expert -> row of this rank's room, of those it has."""
        if not placement.replicas:
            self.home_only()
            return
        own_SE = self._own_alone_SE.copy()
        room_SE = np.full_like(own_SE, self._room_rows)
        turns_S = np.arange(TURNS)
        for expert in {expert for expert, _ in placement.replicas}:
            ranks = [rank for replica, rank in placement.replicas if replica == expert]
            copies = [int(self._home_rank_E[expert]), *sorted(ranks)]
            if self._rank in copies:
                is_mine_S = (turns_S + expert) % len(copies) == copies.index(self._rank)
                own_SE[~is_mine_S, expert] = self._own_rows
                if expert in row_of:
                    room_SE[is_mine_S, expert] = row_of[expert]
        self._write(TURNS, own_SE, room_SE)
        self._first.fill_(own_SE.size)
        self._is_home_only = False

    def home_only(self) -> None:
        """As without replicas. Without Tensor.copy_: vLLM's loaders, inside of which it is called, count what it copies
        to know when a layer is complete, and some replace it."""
        if not self._is_home_only:
            self._first.fill_(0)
            self._is_home_only = True

    def restore(self) -> None:
        """As `home_only`, whatever is in the memory."""
        for first in (0, TURNS):
            self._write(first, self._own_alone_SE, np.full_like(self._own_alone_SE, self._room_rows))
        self._first.fill_(0)
        self._is_home_only = True

    def rows(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row in this rank's weights, row in its room) [T, K] of each pair; the number of rows where it has none."""
        offset_T1 = torch.arange(len(ids_TK), dtype=torch.int32, device=ids_TK.device).remainder_(TURNS)
        offset_T1.mul_(self._own_SE.shape[1]).add_(self._first)
        place = (ids_TK + offset_T1[:, None]).reshape(-1)
        own, room = (table.view(-1).index_select(0, place).view_as(ids_TK) for table in (self._own_SE, self._room_SE))
        return own, room

    def _write(self, first: int, *tables: np.ndarray) -> None:
        """On the stream that computes: steps already enqueued see what was, later ones what is."""
        for tensor, table in zip((self._own_SE, self._room_SE), tables, strict=True):
            tensor[first : first + TURNS].copy_(torch.from_numpy(table))


def compute_captured(
    experts: ChosenExperts,
    room: Mapping[str, torch.Tensor],
    device_map: DeviceMap,
    hidden_TH: torch.Tensor,
    gates_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """This rank's part of the layer's output for the tokens of all ranks [T, H]: their sum over ranks is the output."""
    own_TK, room_TK = device_map.rows(ids_TK)
    output_TH = experts.compute_chosen(experts.weights, hidden_TH, gates_TK, own_TK)
    return output_TH + experts.compute_chosen(room, hidden_TH, gates_TK, room_TK)
