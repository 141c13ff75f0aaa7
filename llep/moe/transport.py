"""Counts, tokens and weights between ranks: every torch.distributed call of llep.

Who enters what, in which order, on every rank of the EP group, also with zero tokens:

1. once per step, before the first layer: `gather` of the step header;
2. per layer where tokens are sharded (data-parallel attention): `gather` of counts, lends, `exchange` out and back;
3. per layer where tokens are replicated (tensor-parallel attention), only if the step is large enough to plan, which
   all ranks know from the header: `gather` of counts, `broadcast` of the routing if a digest differs, lends.

Lends are point to point, posted in the plan's order on both ends, on a communicator of their own, so that they
overlap with the exchange; a rank that neither lends nor borrows posts none. Everything else is a collective that
every rank enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llep.errors import LlepError
from llep.plan import Lend


class PeerLost(LlepError):
    """Another rank of the EP group did not answer in time, or is gone."""

    code = "peer_lost"


def join(rank: int, size: int, store: str, device: torch.device) -> None:
    """Join processes of this machine that meet in the file `store`. For `llep calibrate`; vLLM joins its own ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)


@dataclass(frozen=True, slots=True)
class PendingLends:
    """Transfers under way; `wait` returns when the weights have arrived and may be read, or been sent."""

    transport: Transport
    works: tuple[dist.Work, ...]

    def wait(self) -> None:
        for work in self.works:
            self.transport._wait(work, "lends")


class Transport:
    """The collectives and transfers of one EP group.

    ranks: global ranks of the group, in the order of EP ranks. Creating a Transport is itself a collective over them.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device, watchdog_s: float = 60.0) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.ranks = list(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.device = device
        self.watchdog_s = watchdog_s
        # A first step may compile kernels for minutes, on one rank longer than on another. Over NCCL this limit is the
        # watchdog: waiting with a limit of its own would hold up the host in every collective.
        start_up = timedelta(seconds=max(watchdog_s, 300.0)) if backend == "nccl" else timedelta(minutes=30)
        self._tokens, self._weights = (
            dist.new_group(self.ranks, backend=backend, timeout=start_up, use_local_synchronization=True)
            for _ in range(2)
        )

    @property
    def size(self) -> int:
        return len(self.ranks)

    def gather(self, row: torch.Tensor, what: str) -> torch.Tensor:
        """All ranks' rows, stacked: [N] on each rank -> [R, N]. Every rank enters it, with rows of equal length."""
        rows = row.new_empty(self.size * len(row))
        self._wait(dist.all_gather_single(rows, row, group=self._tokens, async_op=True), what)
        return rows.view(self.size, len(row))

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """Overwrite `tensor` with rank 0's, in place. Every rank enters it."""
        self._wait(dist.broadcast(tensor, self.ranks[0], group=self._tokens, async_op=True), what)

    def exchange(self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> torch.Tensor:
        """All-to-all: rows sorted by destination -> rows sorted by source. Every rank enters it, also with no rows."""
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=self._tokens, async_op=True)
        self._wait(work, "exchange of tokens")
        return received

    def start_lends(
        self,
        lends: Sequence[Lend],
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        pool: Mapping[str, torch.Tensor],
    ) -> PendingLends:
        """Post this rank's sends of home weights and receives into the pool, slots in the order of the plan's lends."""
        works: list[dist.Work] = []
        slot = 0
        # Both ends post in the plan's order: NCCL pairs operations by order, gloo by tag.
        for index, lend in enumerate(lends):
            for part, name in enumerate(weights):
                tag = index * len(weights) + part
                if lend.dst_rank == self.rank:
                    peer = self.ranks[lend.src_rank]
                    works.append(_posted(dist.irecv(pool[name][slot], peer, group=self._weights, tag=tag)))
                elif lend.src_rank == self.rank:
                    row = weights[name][local_ids[lend.expert]]
                    works.append(_posted(dist.isend(row, self.ranks[lend.dst_rank], group=self._weights, tag=tag)))
            slot += lend.dst_rank == self.rank
        return PendingLends(self, tuple(works))

    def _wait(self, work: dist.Work, what: str) -> None:
        try:
            if self.device.type == "cuda":
                work.wait()
            else:
                work.wait(timedelta(seconds=self.watchdog_s))
        except RuntimeError as error:
            raise PeerLost(
                f"EP rank {self.rank} of {self.size} gave up in {what} after at most watchdog_s={self.watchdog_s:g}: "
                "another rank stopped, stalled or disagrees; see the other ranks' logs, and restart the engine "
                f"({error})",
                param="watchdog_s",
            ) from error


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the EP group"
    return work
