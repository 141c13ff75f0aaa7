"""An EP group whose ranks are threads of one process: for tests and benches on one device, with copies for links.

The layer, its plans, its rows and its kernels are those of real ranks; only torch.distributed is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llep.moe.agreement import Evidence
from llep.moe.dispatch import slots_of
from llep.moe.slots import NO_RESIDENTS, Copy, Residents
from llep.plan import Plan

T = TypeVar("T")


class VirtualGroup:
    """What the ranks of one group share: each lays something down, and all look at what all laid down."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self._barrier = threading.Barrier(size, timeout=120)
        self._laid_down: list[Any] = [None] * size

    def run(self, body: Callable[[VirtualTransport], T]) -> list[T]:
        """body(transport) on every rank -> what each returned. Raises what the first failing rank raised."""
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(self._run, body, VirtualTransport(self, rank)) for rank in range(self.size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def _run(self, body: Callable[[VirtualTransport], T], transport: VirtualTransport) -> T:
        try:
            with torch.inference_mode():
                return body(transport)
        except BaseException:
            self._barrier.abort()  # or the others would wait
            raise

    def meet(self, rank: int, mine: Any, look: Callable[[list[Any]], T]) -> T:
        """Lay `mine` down, look at everybody's, and leave together: then what was laid down may change."""
        self._laid_down[rank] = mine
        self._barrier.wait()
        found = look(self._laid_down)
        self._barrier.wait()
        return found


@dataclass(frozen=True, slots=True)
class Arrived:
    """What has come already, in the place of what is under way between real ranks."""

    rows: torch.Tensor

    @property
    def is_here(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self.rows


class VirtualTransport:
    """One rank's end; see llep.moe.transport.Transport for what each method means."""

    def __init__(self, group: VirtualGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size
        self.device = group.device
        self.where = ""
        self.settings_digest = 0
        self.evidence = Evidence()

    def what_differs(self) -> str:
        return ""

    def gather(self, row: torch.Tensor, what: str) -> torch.Tensor:
        return self._group.meet(self.rank, row, torch.stack)

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        self._group.meet(self.rank, tensor, lambda all_: None if self.rank == 0 else tensor.copy_(all_[0]))

    def add_up(self, tensor: torch.Tensor, what: str) -> None:
        tensor.copy_(self._group.meet(self.rank, tensor, lambda all_: torch.stack(all_).sum(dim=0)))

    def exchange(
        self,
        rows: torch.Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        into: torch.Tensor | None = None,
    ) -> Arrived:
        def collect(all_: list[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
            parts = []
            for sent, counts in all_:
                first = sum(counts[: self.rank])
                parts.append(sent[first : first + counts[self.rank]])
            assert [len(part) for part in parts] == receive_counts, "ranks disagree on what travels"
            return torch.cat(parts)

        received = self._group.meet(self.rank, (rows, send_counts), collect)
        return Arrived(received if into is None else into[: len(received)].copy_(received))

    def start_lends(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        pool: Mapping[str, torch.Tensor],
        residents: Residents = NO_RESIDENTS,
    ) -> Arrived:
        slots = slots_of(plan, self.rank)

        def borrow(all_: list[tuple[Mapping[str, torch.Tensor], Residents]]) -> None:
            for lend in plan.lends:
                if lend.dst_rank != self.rank:
                    continue
                theirs, replicas = all_[lend.src_rank]
                row, bank = local_ids[lend.expert], theirs
                if lend.expert in replicas.row_of:
                    row, bank = replicas.row_of[lend.expert], replicas.bank
                for name, tensor in bank.items():
                    pool[name][slots[lend.expert]].copy_(tensor[row])

        self._group.meet(self.rank, (weights, residents), borrow)
        return Arrived(torch.empty(0))

    def start_copies(
        self,
        copies: Sequence[Copy],
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        room: Mapping[str, torch.Tensor],
    ) -> Arrived:
        def fill(all_: list[Mapping[str, torch.Tensor]]) -> None:
            for copy in copies:
                if copy.dst_rank == self.rank:
                    for name, tensor in all_[copy.src_rank].items():
                        room[name][copy.row].copy_(tensor[local_ids[copy.expert]])

        self._group.meet(self.rank, weights, fill)
        return Arrived(torch.empty(0))
