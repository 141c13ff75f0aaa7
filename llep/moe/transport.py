"""Counts, tokens and weights between ranks: every torch.distributed call of llep.

Who enters what, in which order, on every rank of the EP group, also with zero tokens:

1. once per step, before the first layer: `gather` of the step header;
2. per layer where tokens are sharded (data-parallel attention): `gather` of counts, lends; if a rank's rows don't fit
   its workspace, which all ranks know from counts and plan, `gather` of the counts of each block of tokens; then, for
   each block, `exchange` of what pairs are whose, of token rows, and of the sums that go back;
3. per layer where tokens are replicated (tensor-parallel attention), only if the step is large enough to plan, which
   all ranks know from the header: `gather` of counts, `broadcast` of the routing if a digest differs, lends.

Lends are point to point, posted in the plan's order on both ends, on a communicator of their own, so that they
overlap with the exchange; a rank that neither lends nor borrows posts none. Where the plan's relay tree has a rank pass
weights on, it does once they have arrived, whatever it computes meanwhile. Everything else is a collective that every
rank enters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial

import torch
import torch.distributed as dist

from llep.errors import LlepError
from llep.moe.dispatch import slots_of
from llep.plan import Plan

BLAME_WITHIN_S = 3.0  # for the other ranks to give up too and say where


class PeerLost(LlepError):
    """Another rank of the EP group did not answer in time, or is gone."""

    code = "peer_lost"


def join(rank: int, size: int, store: str, device: torch.device) -> None:
    """Join processes of this machine that meet in the file `store`. For `llep calibrate`; vLLM joins its own ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)


@dataclass(slots=True)
class PendingLends:
    """Transfers under way; `wait` returns when all of this rank's weights have arrived, and been passed on."""

    transport: Transport
    works: list[dist.Work]
    forwards: list[Future[list[dist.Work]]]

    def wait(self) -> None:
        """Waiting twice is waiting once."""
        for work in self.works:
            self.transport._wait(work, "lends")
        for forward in self.forwards:
            for work in forward.result():
                self.transport._wait(work, "lends passed on")
        self.works, self.forwards = [], []


@dataclass(frozen=True, slots=True)
class PendingRows:
    """Rows under way; `wait` returns those that arrived, sorted by source."""

    transport: Transport
    work: dist.Work | None
    rows: torch.Tensor
    sent: torch.Tensor  # kept until it has gone

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.transport._wait(self.work, "exchange of tokens")
        return self.rows


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
        self.where = ""  # which step and layer is being computed, for messages
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

    def add_up(self, tensor: torch.Tensor, what: str) -> None:
        """Overwrite `tensor` with the sum over ranks, in place. Every rank enters it, with equal shapes."""
        self._wait(_posted(dist.all_reduce(tensor, group=self._tokens, async_op=True)), what)

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        into: torch.Tensor | None = None,
    ) -> PendingRows:
        """All-to-all: rows sorted by destination -> rows sorted by source. Every rank enters it, also with no rows.

        into: where to put the rows, if not into a new tensor; it must have room for sum(receive_counts).
        """
        total = sum(receive_counts)
        received = rows.new_empty((total, *rows.shape[1:])) if into is None else into[:total]
        if self.size == 1:
            return PendingRows(self, None, received, rows)
        work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=self._tokens, async_op=True)
        return PendingRows(self, _posted(work), received, rows)

    def start_lends(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        pool: Mapping[str, torch.Tensor],
    ) -> PendingLends:
        """Post this rank's part of the plan's transfers: home weights out, weights into the pool, and from there on."""
        slots = slots_of(plan, self.rank)
        pending = PendingLends(self, [], [])
        arriving: dict[int, list[dist.Work]] = {}  # in the order of rounds
        onward: dict[int, list[Callable[[], list[dist.Work]]]] = {}
        # Both ends post in the plan's order: NCCL pairs operations by order, gloo by tag.
        for index, hop in enumerate(plan.transfers):
            first_tag = index * len(weights)
            if hop.dst_rank == self.rank:
                arriving[hop.expert] = self._receive(pool, slots[hop.expert], hop.src_rank, first_tag)
            elif hop.src_rank == self.rank and hop.expert not in slots:
                pending.works += self._send(weights, local_ids[hop.expert], hop.dst_rank, first_tag)
            elif hop.src_rank == self.rank:
                send = partial(self._send, pool, slots[hop.expert], hop.dst_rank, first_tag)
                if self.device.type == "cuda":  # the stream keeps the order
                    pending.works += send()
                else:
                    onward.setdefault(hop.expert, []).append(send)
        for expert, works in arriving.items():
            if expert in onward:  # gloo's receives can be waited for but once: the forwarder does
                pending.forwards.append(self._forwarder.submit(self._forward, works, onward[expert]))
            else:
                pending.works += works
        return pending

    def _send(self, weights: Mapping[str, torch.Tensor], row: int, dst_rank: int, first_tag: int) -> list[dist.Work]:
        peer = self.ranks[dst_rank]
        return [
            _posted(dist.isend(tensor[row], peer, group=self._weights, tag=first_tag + part))
            for part, tensor in enumerate(weights.values())
        ]

    def _receive(self, pool: Mapping[str, torch.Tensor], slot: int, src_rank: int, first_tag: int) -> list[dist.Work]:
        peer = self.ranks[src_rank]
        return [
            _posted(dist.irecv(tensor[slot], peer, group=self._weights, tag=first_tag + part))
            for part, tensor in enumerate(pool.values())
        ]

    def _forward(
        self, arriving: Sequence[dist.Work], sends: Sequence[Callable[[], list[dist.Work]]]
    ) -> list[dist.Work]:
        for work in arriving:
            self._wait(work, "lends to pass on")
        return [work for send in sends for work in send()]

    @cached_property
    def _forwarder(self) -> ThreadPoolExecutor:
        """Passes weights on as soon as they are here, while this rank computes."""
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llep-forward")

    def _wait(self, work: dist.Work, what: str) -> None:
        try:
            if self.device.type == "cuda":
                work.wait()
            else:
                work.wait(timedelta(seconds=self.watchdog_s))
        except RuntimeError as error:
            place = f"{self.where or 'one layer'}, in {what}"
            raise PeerLost(
                f"EP rank {self.rank} of {self.size} gave up at {place}, after at most watchdog_s="
                f"{self.watchdog_s:g}. {self._blame(place)}. See the other ranks' logs, and restart the engine "
                f"({error})",
                param="watchdog_s",
            ) from error

    def _blame(self, place: str) -> str:
        """Which ranks have not given up with this one, and where those are that have: all say so in torch's store."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(self._gave_up_key(self.rank), place)
            others = [rank for rank in range(self.size) if rank != self.rank]
            deadline_s = time.monotonic() + BLAME_WITHIN_S
            while not store.check([self._gave_up_key(rank) for rank in others]) and time.monotonic() < deadline_s:
                time.sleep(0.1)
            places = {r: store.get(k).decode() for r in others if store.check([k := self._gave_up_key(r)])}
        except RuntimeError:
            return "The process that the ranks met at is gone, global rank 0 in general"
        silent = [str(rank) for rank in others if rank not in places]
        waiting = [f"rank {rank} waited at {where}" for rank, where in places.items() if where != place]
        if silent:
            return "; ".join([f"EP rank {', '.join(silent)} stopped or stalled", *waiting])
        return "; ".join(waiting) or "All ranks wait at the same place: the network between them is down or too slow"

    def _gave_up_key(self, rank: int) -> str:
        return f"llep/gave-up/{'-'.join(map(str, self.ranks))}/{rank}"


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the EP group"
    return work
