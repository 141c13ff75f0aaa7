"""Counts, tokens and weights between ranks: every torch.distributed call of llep.

Who enters what, in which order, on every rank of the EP group, also with zero tokens:

1. once per step, before the first layer: `gather` of the step header; then, while resident replicas are being filled,
   their copies, point to point in one order that all know (llep.moe.replicas);
2. per layer where tokens are sharded (data-parallel attention): `gather` of counts, lends; if a rank's rows don't fit
   its workspace, which all ranks know from counts and plan, `gather` of the counts of each block of tokens; then, for
   each block, `exchange` of what pairs are whose, of token rows, and of the sums that go back;
3. per layer where tokens are replicated (tensor-parallel attention), only if the step is large enough to plan, which
   all ranks know from the header: `gather` of counts, `broadcast` of the routing if a digest differs, lends.

Lends are point to point, posted in the plan's order on both ends, on a communicator of their own, so that they
overlap with the exchange; a rank that neither lends nor borrows posts none. Where the plan's relay tree has a rank pass
weights on, it does once they have arrived, whatever it computes meanwhile. Everything else is a collective that every
rank enters. Rows and weights travel as bytes: no backend needs to know their types.

Ranks on CPUs of one machine that may read each other's memory, which they find out when the Transport is made, send no
weights: the rank that has them says where they are, the borrower reads them there in a thread of its own, and says that
it has; until then the lender's wait lasts. Nobody passes them on: reading costs who reads.

On CUDA all of it is enqueued: lends on a stream of their own, one batch a round of the relay tree, which NCCL's stream
keeps in order; waiting holds up the computing stream, not the host.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from llep.errors import LlepError
from llep.moe import neighbours
from llep.moe.agreement import HELD_ALIKE, Evidence, RanksDisagree
from llep.moe.dispatch import slots_of
from llep.moe.slots import NO_RESIDENTS, Copy, Residents, bytes_of_expert
from llep.plan import Plan, Transfer

DIFFERS = "than the others"
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
    forwards: list[Future[list[dist.Work]]]  # what threads have posted, once they are done

    def wait(self) -> None:
        """Waiting twice is waiting once."""
        for work in self.works:
            self.transport._wait(work, "lends")
        for forward in self.forwards:
            for work in forward.result():
                self.transport._wait(work, "lends passed on, or read")
        self.works, self.forwards = [], []


@dataclass(frozen=True, slots=True)
class PendingRows:
    """Rows under way; `wait` returns those that arrived, sorted by source."""

    transport: Transport
    work: dist.Work | None
    rows: torch.Tensor
    sent: torch.Tensor  # kept until it has gone

    @property
    def is_here(self) -> bool:
        """Over NCCL what is enqueued keeps its order without the host: rows count as still to come."""
        return self.work is None or (not self.rows.is_cuda and self.work.is_completed())

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.transport._wait(self.work, "exchange of tokens")
        return self.rows


@dataclass(frozen=True, slots=True)
class _Hop:
    """This rank's end of a transfer: the row of the bank that is sent, or filled, and the tag of its first tensor."""

    transfer: Transfer
    first_tag: int
    bank: Mapping[str, torch.Tensor]
    row: int


class Transport:
    """The collectives and transfers of one EP group.

    ranks: global ranks of the group, in the order of EP ranks. Creating a Transport is itself a collective over them.
    may_read: whether this rank takes weights from other ranks' memory where it can; if one can't, none does.
    """

    def __init__(
        self, ranks: Sequence[int], device: torch.device, watchdog_s: float = 60.0, *, may_read: bool = True
    ) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.ranks = list(ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.device = device
        self.watchdog_s = watchdog_s
        self.where = ""  # which step and layer is being computed, for messages
        self.settings_digest = 0  # of the settings that are live: told with every layer's counts, as is the evidence
        self.evidence = Evidence()
        # A first step may compile kernels for minutes, on one rank longer than on another. Over NCCL this limit is the
        # watchdog: waiting with a limit of its own would hold up the host in every collective.
        start_up = timedelta(seconds=max(watchdog_s, 300.0)) if backend == "nccl" else timedelta(minutes=30)
        self._tokens, self._weights = (
            dist.new_group(self.ranks, backend=backend, timeout=start_up, use_local_synchronization=True)
            for _ in range(2)
        )
        self._lending_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._lending_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # A first batch of transfers must find the communicator made: not all ranks enter it.
            dist.all_reduce(torch.zeros(1, device=device), group=self._weights)
        self._processes = None if device.type == "cuda" else self._readable_processes(may_read)

    def _readable_processes(self, may_read: bool) -> list[int] | None:
        """The process of each rank, if all ranks can read all others' memory. Every rank enters it."""
        self._mark = neighbours.Mark()  # stays where it is while others may look
        marks_R3 = self.gather(self._mark.row, "naming of processes")
        can_read = may_read and all(neighbours.is_readable(row) for row in marks_R3)
        verdicts = self.gather(torch.tensor([int(can_read)]), "comparison of who can read whom")
        return marks_R3[:, 0].tolist() if verdicts.all() else None

    @property
    def lends_by(self) -> str:
        """How weights get to another rank: 'nccl', 'gloo', or 'reading' where ranks share a machine's memory."""
        if self.device.type == "cuda":
            return "nccl"
        return "gloo" if self._processes is None else "reading"

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
        work = dist.all_to_all_single(
            _bytes_of_rows(received),
            _bytes_of_rows(rows),
            receive_counts,
            send_counts,
            group=self._tokens,
            async_op=True,
        )
        return PendingRows(self, _posted(work), received, rows)

    def start_lends(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        pool: Mapping[str, torch.Tensor],
        residents: Residents = NO_RESIDENTS,
    ) -> PendingLends:
        """Post this rank's part of the plan's transfers: weights that it has out, others into the pool, and on."""
        slots = slots_of(plan, self.rank)
        transfers = plan.transfers if self._processes is None else _from_the_root(plan.transfers)

        def place(expert: int) -> tuple[Mapping[str, torch.Tensor], int]:
            if expert in slots:
                return pool, slots[expert]
            if expert in residents.row_of:
                return residents.bank, residents.row_of[expert]
            return weights, local_ids[expert]

        return self._start(
            [
                _Hop(hop, index * len(weights), *place(hop.expert))
                for index, hop in enumerate(transfers)
                if self.rank in (hop.src_rank, hop.dst_rank)
            ]
        )

    def start_copies(
        self,
        copies: Sequence[Copy],
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        room: Mapping[str, torch.Tensor],
    ) -> PendingLends:
        """Post this rank's part of filling resident replicas of one layer, in the order of copies."""
        hops = []
        for index, copy in enumerate(copies):
            transfer = Transfer(copy.expert, copy.src_rank, copy.dst_rank, 0)
            if copy.dst_rank == self.rank:
                hops.append(_Hop(transfer, index * len(weights), room, copy.row))
            elif copy.src_rank == self.rank:
                hops.append(_Hop(transfer, index * len(weights), weights, local_ids[copy.expert]))
        return self._start(hops)

    def _start(self, hops: Sequence[_Hop]) -> PendingLends:
        if self._processes is not None:
            return self._start_reading(hops, self._processes)
        return self._start_batches(hops) if self.device.type == "cuda" else self._start_each(hops)

    def _start_reading(self, hops: Sequence[_Hop], processes: Sequence[int]) -> PendingLends:
        """Say where the weights are that others read, and read those that others have, in a thread, in this order."""
        pending = PendingLends(self, [], [])
        offers: list[tuple[_Hop, torch.Tensor, dist.Work]] = []
        for hop in hops:
            if hop.transfer.src_rank == self.rank:
                peer = self.ranks[hop.transfer.dst_rank]
                offer, receipt = _offer(hop), torch.empty(1, dtype=torch.uint8)
                pending.works += [
                    _posted(dist.isend(offer, peer, group=self._weights, tag=hop.first_tag)),
                    _posted(dist.irecv(receipt, peer, group=self._weights, tag=hop.first_tag)),
                ]
            else:
                offer = torch.empty((len(hop.bank), 2), dtype=torch.int64)
                peer = self.ranks[hop.transfer.src_rank]
                offers.append((hop, offer, _posted(dist.irecv(offer, peer, group=self._weights, tag=hop.first_tag))))
        if offers:
            pending.forwards.append(self._forwarder.submit(self._read, offers, processes))
        return pending

    def _read(
        self, offers: Sequence[tuple[_Hop, torch.Tensor, dist.Work]], processes: Sequence[int]
    ) -> list[dist.Work]:
        """Fill the rows of the bank as offered; the receipts that are under way then."""
        receipts = []
        for hop, offer, work in offers:
            self._wait(work, "lends offered")
            src_rank = hop.transfer.src_rank
            for (name, tensor), (address, size) in zip(hop.bank.items(), offer.tolist(), strict=True):
                room = bytes_of_expert(tensor, hop.row)
                if len(room) != size:
                    raise RanksDisagree(
                        f"EP rank {src_rank} lends {name} of expert {hop.transfer.expert} as {size} bytes, EP rank "
                        f"{self.rank} has room for {len(room)}: their weights must have the same form"
                    )
                try:
                    neighbours.read(processes[src_rank], address, room)
                except OSError as error:
                    raise self._lost("lends read", error) from error
            receipt = torch.ones(1, dtype=torch.uint8)
            receipts.append(_posted(dist.isend(receipt, self.ranks[src_rank], group=self._weights, tag=hop.first_tag)))
        return receipts

    def _start_each(self, hops: Sequence[_Hop]) -> PendingLends:
        """Over gloo: both ends post in the plan's order, which the tags keep."""
        pending = PendingLends(self, [], [])
        arriving: dict[int, list[dist.Work]] = {}  # in the order of rounds
        onward: dict[int, list[_Hop]] = {}
        for hop in hops:
            if hop.transfer.dst_rank == self.rank:
                arriving[hop.transfer.expert] = self._post(hop)
            elif hop.transfer.expert in arriving:
                onward.setdefault(hop.transfer.expert, []).append(hop)
            else:
                pending.works += self._post(hop)
        for expert, works in arriving.items():
            if expert in onward:  # gloo's receives can be waited for but once: the forwarder does
                pending.forwards.append(self._forwarder.submit(self._forward, works, onward[expert]))
            else:
                pending.works += works
        return pending

    def _start_batches(self, hops: Sequence[_Hop]) -> PendingLends:
        """Over NCCL: a group of sends and receives for each round, one after the other on the communicator's stream."""
        pending = PendingLends(self, [], [])
        with self._beside_computing():
            for _, in_round in groupby(hops, key=lambda hop: hop.transfer.round):
                pending.works += dist.batch_isend_irecv([part for hop in in_round for part in self._parts(hop)])
        return pending

    def _beside_computing(self) -> AbstractContextManager[object]:
        """What is enqueued within waits for what was enqueued so far, which may read the pool, but not the reverse."""
        if self._lending_stream is None:
            return nullcontext()
        self._lending_stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._lending_stream)

    def _parts(self, hop: _Hop) -> list[dist.P2POp]:
        """The sends, or receives, of one expert: one for each of its tensors."""
        is_sender = hop.transfer.src_rank == self.rank
        peer = self.ranks[hop.transfer.dst_rank if is_sender else hop.transfer.src_rank]
        return [
            dist.P2POp(
                dist.isend if is_sender else dist.irecv,
                bytes_of_expert(tensor, hop.row),
                peer,
                self._weights,
                hop.first_tag + part,
            )
            for part, tensor in enumerate(hop.bank.values())
        ]

    def _post(self, hop: _Hop) -> list[dist.Work]:
        return [_posted(part.op(part.tensor, part.peer, group=part.group, tag=part.tag)) for part in self._parts(hop)]

    def _forward(self, arriving: Sequence[dist.Work], onward: Sequence[_Hop]) -> list[dist.Work]:
        for work in arriving:
            self._wait(work, "lends to pass on")
        return [work for hop in onward for work in self._post(hop)]

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
            raise self._lost(what, error) from error

    def _lost(self, what: str, error: Exception) -> PeerLost:
        place = f"{self.where or 'one layer'}, in {what}"
        return PeerLost(
            f"EP rank {self.rank} of {self.size} gave up at {place}, after at most watchdog_s="
            f"{self.watchdog_s:g}. {self._blame(place)}. See the other ranks' logs, and restart the engine ({error})",
            param="watchdog_s",
        )

    def what_differs(self) -> str:
        """What other ranks that gave up hold that this one, which gives up too, does not; '' if nothing is known."""
        found = self._blame(self.where)
        return found if DIFFERS in found else ""

    def _blame(self, place: str) -> str:
        """Which ranks have not given up with this one, where those are that have, and what they hold that this one
        does not: all say so in torch's store."""
        mine: dict[str, Any] = {"place": place, "where": self.where}
        if self.evidence.where == self.where:  # else nothing is planned there yet, which others may have done
            mine |= zip(HELD_ALIKE, self.evidence.digests, strict=True)
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(self._gave_up_key(self.rank), json.dumps(mine))
            others = [rank for rank in range(self.size) if rank != self.rank]
            deadline_s = time.monotonic() + BLAME_WITHIN_S
            while not store.check([self._gave_up_key(rank) for rank in others]) and time.monotonic() < deadline_s:
                time.sleep(0.1)
            told = {r: json.loads(store.get(k)) for r in others if store.check([k := self._gave_up_key(r)])}
        except RuntimeError:
            return "The process that the ranks met at is gone, global rank 0 in general"
        return _verdict({self.rank: mine} | told, self.size, self.rank)

    def _gave_up_key(self, rank: int) -> str:
        return f"llep/gave-up/{'-'.join(map(str, self.ranks))}/{rank}"


def _verdict(told: Mapping[int, Mapping[str, Any]], size: int, rank: int) -> str:
    """What `rank` makes of what the ranks say that have given up."""
    mine = told[rank]
    said = []
    if silent := [str(other) for other in range(size) if other not in told]:
        said.append(f"EP rank {', '.join(silent)} stopped or stalled")
    at_the_same = {other: it for other, it in sorted(told.items()) if it["where"] == mine["where"]}
    for what in HELD_ALIKE:
        held = Counter(it[what] for it in at_the_same.values() if what in it)
        if len(held) > 1:
            usual = held.most_common(1)[0][0]
            odd = ", ".join(str(other) for other, it in at_the_same.items() if it.get(what, usual) != usual)
            said.append(f"EP rank {odd} holds other {what} {DIFFERS}: its memory or its build of llep differs")
            break  # another plan follows from other counts
    waiting = {other: it["place"] for other, it in told.items() if it["place"] != mine["place"]}
    said += [f"rank {other} waited at {place}" for other, place in sorted(waiting.items())]
    return "; ".join(said) or "All ranks wait at the same place: the network between them is down or too slow"


def _from_the_root(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The same transfers with no rank between: from whoever has the expert before the first of them."""
    roots: dict[int, int] = {}
    return [hop._replace(src_rank=roots.setdefault(hop.expert, hop.src_rank), round=0) for hop in transfers]


def _offer(hop: _Hop) -> torch.Tensor:
    """[tensors, 2] int64: where each of an expert's tensors is in this process, and its bytes."""
    stretches = [bytes_of_expert(tensor, hop.row) for tensor in hop.bank.values()]
    return torch.tensor([(stretch.data_ptr(), len(stretch)) for stretch in stretches], dtype=torch.int64)


def _bytes_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as [rows, bytes] uint8."""
    return rows.view(torch.uint8) if rows.ndim > 1 else rows[:, None].view(torch.uint8)


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the EP group"
    return work
