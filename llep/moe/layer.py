"""The step of one MoE layer on one rank: count, plan, lend, dispatch, experts, combine.

Shape letters: T tokens of this rank, K top-k, P pairs, H hidden, E experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from llep.moe.dispatch import Rows, dispatch, share
from llep.moe.slots import LendingPool
from llep.moe.transport import PendingLends, Transport
from llep.plan import Plan

Counts = npt.NDArray[np.int64]
Decide = Callable[[Counts], Plan]


class Experts(Protocol):
    """The experts that live on this rank, and how to compute with them or with a pool of borrowed ones.

    `weights` are what is lent: contiguous tensors whose first dimension is local experts.
    """

    @property
    def weights(self) -> Mapping[str, torch.Tensor]: ...

    def compute(
        self, bank: Mapping[str, torch.Tensor], rows_PH: torch.Tensor, experts_P: torch.Tensor, gates_P: torch.Tensor
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H]; experts_P are rows of `bank` (`weights`, or a pool's tensors)."""


@dataclass(slots=True)
class PhaseTimes:
    """Seconds spent in each phase of one layer. `lend` is what waiting for weights cost, not the transfer itself."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class LayerResult:
    """counts_RE: pairs from each source; one source where tokens are replicated."""

    output_TH: torch.Tensor
    plan: Plan
    counts_RE: Counts
    times: PhaseTimes


class LeastLoadedMoE:
    """The experts of one layer, spread over an EP group.

    home_rank[expert], local_ids[expert]: the rank that owns an expert and its row in that rank's weights.
    """

    def __init__(
        self,
        experts: Experts,
        transport: Transport,
        pool: LendingPool,
        home_rank: Sequence[int],
        local_ids: Sequence[int],
    ) -> None:
        _check_weights(experts.weights, pool)
        self.experts = experts
        self.transport = transport
        self.pool = pool
        self.home_rank = tuple(home_rank)
        self.local_ids = tuple(local_ids)
        self.num_experts = len(self.home_rank)

    def forward_replicated(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, decide: Decide, *, agree: bool
    ) -> LayerResult:
        """Every rank holds all tokens; returns this rank's partial sum [T, H], to be summed over ranks by the caller.

        agree: all ranks plan from counts that were made equal; must be the same on all ranks. Without it the plan
        must be plain EP.
        """
        times = PhaseTimes()
        with times.measure("count"):
            if agree:
                gates_TK, ids_TK = self._agree_on_routing(gates_TK, ids_TK)
            counts_E = self._count(ids_TK)
        with times.measure("plan"):
            plan = decide(counts_E[None])
        lends = self._lend(plan)
        with times.measure("dispatch"):
            order_P = _by_expert(ids_TK)
            home, lent = share(plan, counts_E, self.transport.rank, self.local_ids)
        output_TH = torch.zeros_like(hidden_TH)

        def compute(rows: Rows, bank: Mapping[str, torch.Tensor]) -> None:
            if len(rows):
                pairs_P = order_P[_on(order_P, rows.positions)]
                tokens_P = pairs_P // ids_TK.shape[1]
                gates_P = gates_TK.reshape(-1)[pairs_P]
                results_PH = self.experts.compute(bank, hidden_TH[tokens_P], _on(order_P, rows.experts), gates_P)
                _add_rows(output_TH, tokens_P, results_PH)

        with times.measure("compute"):
            compute(home, self.experts.weights)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            compute(lent, self.pool.tensors)
        return LayerResult(output_TH, plan, counts_E[None], times)

    def forward_sharded(
        self,
        hidden_TH: torch.Tensor,
        gates_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        decide: Decide,
        *,
        gate_on_input: bool = False,
    ) -> LayerResult:
        """Every rank holds its own tokens (also none); returns their full outputs [T, H].

        gate_on_input: the router's weight scales the expert's input, not its output.
        """
        times = PhaseTimes()
        with times.measure("count"):
            row_E = torch.from_numpy(self._count(ids_TK)).to(hidden_TH.device)
            counts_RE = self.transport.gather(row_E, "exchange of counts").cpu().numpy()
        with times.measure("plan"):
            plan = decide(counts_RE)
        lends = self._lend(plan)
        with times.measure("dispatch"):
            order_P = _by_expert(ids_TK)
            parts = dispatch(plan, counts_RE, self.transport.rank, self.local_ids)
            pairs_P = order_P[_on(order_P, parts.send_order)]
            tokens_P = pairs_P // ids_TK.shape[1]
            gates_P1 = gates_TK.reshape(-1)[pairs_P].to(hidden_TH.dtype)[:, None]
            sent_PH = hidden_TH[tokens_P] * gates_P1 if gate_on_input else hidden_TH[tokens_P]
            rows_PH = self.transport.exchange(sent_PH, parts.send_counts, parts.receive_counts)
        results_PH = torch.empty_like(rows_PH)

        def compute(rows: Rows, bank: Mapping[str, torch.Tensor]) -> None:
            if len(rows):
                positions_P = _on(order_P, rows.positions)
                ones_P = gates_TK.new_ones(len(rows))
                experts_P = _on(order_P, rows.experts)
                results_PH[positions_P] = self.experts.compute(bank, rows_PH[positions_P], experts_P, ones_P)

        with times.measure("compute"):
            compute(parts.home, self.experts.weights)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            compute(parts.lent, self.pool.tensors)
        with times.measure("combine"):
            returned_PH = self.transport.exchange(results_PH, parts.receive_counts, parts.send_counts)
            output_TH = torch.zeros_like(hidden_TH)
            _add_rows(output_TH, tokens_P, returned_PH if gate_on_input else returned_PH * gates_P1)
        return LayerResult(output_TH, plan, counts_RE, times)

    def _count(self, ids_TK: torch.Tensor) -> Counts:
        """Pairs of each expert [E]: the one copy of a layer's counts from device to host."""
        counts: Counts = torch.bincount(ids_TK.reshape(-1), minlength=self.num_experts).cpu().numpy().astype(np.int64)
        if len(counts) > self.num_experts:
            raise ValueError(f"ids_TK holds expert {len(counts) - 1}, but there are {self.num_experts} experts")
        return counts

    def _agree_on_routing(self, gates_TK: torch.Tensor, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank 0's routing, if any rank's differs; else what everybody holds already."""
        digests_R1 = self.transport.gather(_digest(ids_TK), "comparison of routing")
        if bool((digests_R1 == digests_R1[0]).all()):
            return gates_TK, ids_TK
        gates_TK, ids_TK = gates_TK.contiguous().clone(), ids_TK.contiguous().clone()
        self.transport.broadcast(gates_TK, "broadcast of routing")
        self.transport.broadcast(ids_TK, "broadcast of routing")
        return gates_TK, ids_TK

    def _lend(self, plan: Plan) -> PendingLends:
        return self.transport.start_lends(plan.lends, self.experts.weights, self.local_ids, self.pool.tensors)


def _by_expert(ids_TK: torch.Tensor) -> torch.Tensor:
    """Pairs sorted by expert, and by token within an expert: the plan's order."""
    return torch.argsort(ids_TK.reshape(-1), stable=True)


def _digest(ids_TK: torch.Tensor) -> torch.Tensor:
    """[1] int64 that differs, but for one chance in 2^63, where the routing does; wraps around by design."""
    flat = ids_TK.reshape(-1).to(torch.int64)
    weights = torch.arange(1, len(flat) + 1, device=flat.device) * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1
    return ((flat + 1) * (weights ^ (weights >> 29))).sum()[None]


def _add_rows(output_TH: torch.Tensor, tokens_P: torch.Tensor, rows_PH: torch.Tensor) -> None:
    """Add each row to its token's output, in one order always: index_add_ on CUDA adds in any order."""
    if output_TH.is_cuda:
        output_TH.index_put_((tokens_P,), rows_PH, accumulate=True)
    else:
        output_TH.index_add_(0, tokens_P, rows_PH)


def _on(like: torch.Tensor, index: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(index).to(like.device)


def _check_weights(weights: Mapping[str, torch.Tensor], pool: LendingPool) -> None:
    for name, tensor in weights.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"weights[{name!r}] must be contiguous, so that experts can be lent; got strides {tensor.stride()}"
            )
        if tensor.shape[1:] != pool.tensors[name].shape[1:] or tensor.dtype != pool.tensors[name].dtype:
            raise ValueError(
                f"weights[{name!r}] {tuple(tensor.shape)} {tensor.dtype} does not fit the pool's "
                f"{tuple(pool.tensors[name].shape)} {pool.tensors[name].dtype}"
            )
