"""The step of one MoE layer on one rank: count, plan, lend, dispatch, experts, combine.

Shape letters: T tokens of this rank, K top-k, P pairs, H hidden, E experts, R ranks, G groups of pairs of one expert,
N token rows, B blocks of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llep.errors import LlepError
from llep.moe.dispatch import Dispatch, Index, Rows, Shares
from llep.moe.slots import LendingPool
from llep.moe.workspace import Workspace
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
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        gates_P: torch.Tensor,
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H].

        The first counts_G[0] rows are for row experts_G[0] of `bank` (`weights`, or a pool's tensors), and so on.
        """


class BadBatch(LlepError, ValueError):
    """A batch that this layer can't compute, on this rank or on another: nobody computes it."""

    code = "bad_batch"


class Waits(Protocol):
    """Something under way."""

    def wait(self) -> object: ...


class RowsUnderWay(Protocol):
    """Rows on their way here; `wait` returns them."""

    def wait(self) -> torch.Tensor: ...


class Group(Protocol):
    """One rank's end of its EP group: llep.moe.transport.Transport, or llep.moe.virtual's for tests."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def where(self) -> str: ...

    def gather(self, row: torch.Tensor, what: str) -> torch.Tensor: ...
    def broadcast(self, tensor: torch.Tensor, what: str) -> None: ...
    def add_up(self, tensor: torch.Tensor, what: str) -> None: ...
    def exchange(
        self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int], into: torch.Tensor | None = None
    ) -> RowsUnderWay: ...
    def start_lends(
        self,
        plan: Plan,
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        pool: Mapping[str, torch.Tensor],
    ) -> Waits: ...


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

    home_rank[expert], local_ids[expert]: the rank that owns an expert and its row in that rank's weights. The pool and
    the workspace may be shared by all layers of a rank. Raises ValueError for weights that can't be lent.
    """

    def __init__(
        self,
        experts: Experts,
        transport: Group,
        pool: LendingPool,
        home_rank: Sequence[int],
        local_ids: Sequence[int],
        workspace: Workspace,
    ) -> None:
        _check_weights(experts.weights, pool)
        self.experts = experts
        self.transport = transport
        self.pool = pool
        self.home_rank = tuple(home_rank)
        self.local_ids = tuple(local_ids)
        self.num_experts = len(self.home_rank)
        self.workspace = workspace

    def forward_replicated(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, decide: Decide, *, agree: bool
    ) -> LayerResult:
        """Every rank holds all tokens; returns this rank's partial sum [T, H], to be summed over ranks by the caller.

        agree: all ranks plan from counts that were made equal; must be the same on all ranks. Without it the plan
        must be plain EP. Raises BadBatch, with agree on every rank.
        """
        times = PhaseTimes()
        with times.measure("count"):
            problem = self._problem(hidden_TH, gates_TK, ids_TK)
            if agree:
                gates_TK, ids_TK, counts_E = self._agree_on_routing(gates_TK, ids_TK, problem)
            else:
                counts_E, problem = self._count(ids_TK, problem)
                if problem:
                    raise BadBatch(problem)
        with times.measure("plan"):
            plan = decide(counts_E[None])
        lends = self._lend(plan)
        with times.measure("dispatch"):
            held = _Held.of(hidden_TH, gates_TK, ids_TK)
            own = Shares.of(plan, counts_E[None], ids_TK.shape[1]).own(self.transport.rank, 0, self.local_ids)
            output_TH = torch.zeros_like(hidden_TH)
        with times.measure("compute"):
            self._add(output_TH, held, own.home, self.experts.weights)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            self._add(output_TH, held, own.lent, self.pool.tensors)
        return LayerResult(output_TH, plan, counts_E[None], times)

    def forward_sharded(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, decide: Decide
    ) -> LayerResult:
        """Every rank holds its own tokens (also none); returns their full outputs [T, H].

        A token goes to a rank once, however many of its experts are there, and comes back as one weighted sum; what a
        rank computes of its own tokens does not travel. Raises BadBatch on every rank if one rank's batch is bad.
        """
        times = PhaseTimes()
        with times.measure("count"):
            counts_RE = self._gather_counts(hidden_TH, gates_TK, ids_TK)
        with times.measure("plan"):
            plan = decide(counts_RE)
        lends = self._lend(plan)
        with times.measure("dispatch"):
            output_TH = torch.zeros_like(hidden_TH)
            shares, at_a_time = self._part(Shares.of(plan, counts_RE, ids_TK.shape[1]), ids_TK)
        for block in range(len(shares.tokens_Q) // self.transport.size):
            tokens = slice(block * at_a_time, (block + 1) * at_a_time)
            with times.measure("dispatch"):
                held = _Held.of(hidden_TH[tokens], gates_TK[tokens], ids_TK[tokens])
                parts = shares.dispatch(self.transport.rank, block, self.local_ids)
            self._compute_block(output_TH[tokens], held, parts, lends, times)
        lends.wait()
        return LayerResult(output_TH, plan, counts_RE, times)

    def _compute_block(
        self, output_TH: torch.Tensor, held: _Held, parts: Dispatch, lends: Waits, times: PhaseTimes
    ) -> None:
        """Add to output_TH what all ranks compute of one block of this rank's tokens, and do this rank's part."""
        exchange, buffers = self.transport.exchange, self.workspace.buffers(output_TH)
        with times.measure("dispatch"):
            sent_P = _on(output_TH, parts.send_order)
            rows_P, tokens_N = _rows_of(held.tokens_P[sent_P], parts, len(output_TH))
            labels_P2 = torch.stack((rows_P.to(torch.float32), held.gates_P[sent_P].to(torch.float32)), dim=1)
            labels = exchange(labels_P2, parts.pairs_to, parts.pairs_from)
            sent_NH = torch.index_select(held.rows_NH, 0, tokens_N, out=buffers.sent[: len(tokens_N)])
            rows = exchange(sent_NH, parts.rows_to, parts.rows_from, buffers.received)
        with times.measure("compute"):
            self._add(output_TH, held, parts.own.home, self.experts.weights)
        with times.measure("dispatch"):
            labels_P2, received_NH = labels.wait(), rows.wait()
            first_P = _on(output_TH, np.repeat(_starts(parts.rows_from), parts.pairs_from))
            arrived = _Held(received_NH, labels_P2[:, 0].to(torch.int64) + first_P, labels_P2[:, 1])
            sums_NH = buffers.sums[: len(received_NH)].zero_()
        with times.measure("compute"):
            self._add(sums_NH, arrived, parts.arrived.home, self.experts.weights)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            self._add(output_TH, held, parts.own.lent, self.pool.tensors)
            self._add(sums_NH, arrived, parts.arrived.lent, self.pool.tensors)
        with times.measure("combine"):
            returned_NH = exchange(sums_NH, parts.rows_from, parts.rows_to, buffers.sent).wait()
            _add_rows(output_TH, tokens_N, returned_NH)

    def _add(self, sums_NH: torch.Tensor, held: _Held, rows: Rows, bank: Mapping[str, torch.Tensor]) -> None:
        """Add gate x expert(row) of each of these pairs to its row of sums_NH."""
        inputs = self.workspace.buffers(sums_NH).inputs
        for part in rows.chunks(len(inputs)):
            positions_P = _on(sums_NH, part.positions_P)
            rows_P = held.tokens_P[positions_P]
            inputs_PH = torch.index_select(held.rows_NH, 0, rows_P, out=inputs[: len(part)])
            gates_P = held.gates_P[positions_P]
            _add_rows(sums_NH, rows_P, self.experts.compute(bank, inputs_PH, part.experts_G, part.counts_G, gates_P))

    def _gather_counts(self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor) -> Counts:
        """Pairs of each rank for each expert [R, E]. Raises BadBatch on every rank if one rank's batch is bad."""
        counts_E, problem = self._count(ids_TK, self._problem(hidden_TH, gates_TK, ids_TK))
        form = (0, 0, 0) if problem else (ids_TK.shape[1], hidden_TH.shape[1], hidden_TH.element_size())
        row = torch.from_numpy(np.r_[counts_E, form, bool(problem)].astype(np.int64)).to(self.transport.device)
        rows_RN: Counts = self.transport.gather(row, "exchange of counts").cpu().numpy()
        self._refuse_together(problem, rows_RN[:, -1])
        forms_R3 = rows_RN[:, -4:-1]
        if (forms_R3 != forms_R3[0]).any():
            raise BadBatch(
                "EP ranks bring batches of different forms, (experts per token, hidden size, bytes per value) "
                f"{forms_R3.tolist()}: they must be equal"
            )
        return rows_RN[:, :-4]

    def _part(self, shares: Shares, ids_TK: torch.Tensor) -> tuple[Shares, int]:
        """Shares of blocks that fit the workspace, and the tokens of each source in a block. Every rank enters it."""
        most_tokens = int(shares.tokens_Q.max())
        if self.transport.size == 1 or shares.most_rows() <= self.workspace.wire_rows:
            return shares, most_tokens
        at_a_time = self.workspace.tokens_at_a_time(self.transport.size)
        num_blocks = -(-most_tokens // at_a_time)
        block_T = torch.arange(len(ids_TK), device=ids_TK.device) // at_a_time
        places_TK = ids_TK.to(torch.int64) + (block_T * self.num_experts)[:, None]
        counts_BE = torch.bincount(places_TK.reshape(-1), minlength=num_blocks * self.num_experts)
        counts = self.transport.gather(counts_BE.to(self.transport.device), "exchange of counts of blocks")
        counts_QE = counts.cpu().numpy().reshape(-1, self.num_experts)
        return Shares.of(shares.plan, counts_QE, ids_TK.shape[1]), at_a_time

    def _count(self, ids_TK: torch.Tensor, problem: str) -> tuple[Counts, str]:
        """Pairs of each expert [E], and what is wrong with them or was before: the one copy from device to host."""
        if problem:
            return np.zeros(self.num_experts, dtype=np.int64), problem
        # One place below and one above, for ids that are out of range.
        places = (ids_TK.reshape(-1).to(torch.int64) + 1).clamp(0, self.num_experts + 1)
        return self._checked(torch.bincount(places, minlength=self.num_experts + 2).cpu().numpy().astype(np.int64))

    def _checked(self, places: Counts) -> tuple[Counts, str]:
        outside = int(places[0] + places[-1])
        problem = f"ids_TK: {outside} ids are outside 0..{self.num_experts - 1}, this layer's experts"
        return places[1:-1], problem if outside else ""

    def _agree_on_routing(
        self, gates_TK: torch.Tensor, ids_TK: torch.Tensor, problem: str
    ) -> tuple[torch.Tensor, torch.Tensor, Counts]:
        """Rank 0's routing, if any rank's differs, else what everybody holds already; and pairs of each expert [E]."""
        counts_E, problem = self._count(ids_TK, problem)
        digest = torch.zeros(1, dtype=torch.int64, device=self.transport.device) if problem else _digest(ids_TK)
        row = torch.cat((digest, digest.new_full((1,), bool(problem))))
        rows_R2 = self.transport.gather(row, "comparison of routing").cpu().numpy()
        self._refuse_together(problem, rows_R2[:, 1])
        if (rows_R2[:, 0] == rows_R2[0, 0]).all():
            return gates_TK, ids_TK, counts_E
        gates_TK, ids_TK = gates_TK.contiguous().clone(), ids_TK.contiguous().clone()
        self.transport.broadcast(gates_TK, "broadcast of routing")
        self.transport.broadcast(ids_TK, "broadcast of routing")
        return gates_TK, ids_TK, self._count(ids_TK, "")[0]

    def _refuse_together(self, problem: str, is_bad_R: Counts) -> None:
        """Raises BadBatch on every rank if any rank says that its batch is bad."""
        if problem:
            raise BadBatch(problem)
        if is_bad_R.any():
            bad = ", ".join(map(str, np.flatnonzero(is_bad_R)))
            raise BadBatch(f"EP rank {bad} refused its batch; see its log. Nobody computes this layer")

    def _problem(self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor) -> str:
        """What is wrong with a batch's tensors; '' if nothing is. Costs no copy from the device."""
        tensors = {"hidden_TH": hidden_TH, "gates_TK": gates_TK, "ids_TK": ids_TK}
        for name, tensor in tensors.items():
            if tensor.ndim != 2:
                return f"{name} has shape {tuple(tensor.shape)}: it must have two dimensions"
            if tensor.device.type != self.transport.device.type:
                return f"{name} is on {tensor.device}: the EP group is on {self.transport.device}"
        if gates_TK.shape != ids_TK.shape:
            return f"gates_TK has shape {tuple(gates_TK.shape)}, ids_TK {tuple(ids_TK.shape)}: they must be equal"
        if len(hidden_TH) != len(ids_TK):
            return f"hidden_TH has {len(hidden_TH)} tokens, ids_TK {len(ids_TK)}: they must be as many"
        if not hidden_TH.is_floating_point() or not gates_TK.is_floating_point():
            return f"hidden_TH is {hidden_TH.dtype}, gates_TK {gates_TK.dtype}: they must be floating point"
        if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
            return f"ids_TK is {ids_TK.dtype}: it must be an integer type"
        return ""

    def _lend(self, plan: Plan) -> Waits:
        return self.transport.start_lends(plan, self.experts.weights, self.local_ids, self.pool.tensors)


class _Held(NamedTuple):
    """Pairs at hand: each one's row of rows_NH, and its gate."""

    rows_NH: torch.Tensor
    tokens_P: torch.Tensor
    gates_P: torch.Tensor

    @classmethod
    def of(cls, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor) -> _Held:
        """All pairs of these tokens, sorted by expert, and by token within an expert: the plan's order."""
        order_P = torch.argsort(ids_TK.reshape(-1), stable=True)
        return cls(hidden_TH, order_P // max(ids_TK.shape[1], 1), gates_TK.reshape(-1)[order_P])


def _rows_of(tokens_P: torch.Tensor, parts: Dispatch, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token each sent row carries [N], and which of its destination's rows each sent pair is about [P].

    Returned as (rows_P, tokens_N). Rows that no pair is about, since fewer tokens than might go somewhere, carry token
    0 and come back as zeros.
    """
    to_P = _on(tokens_P, np.repeat(np.arange(len(parts.pairs_to)), parts.pairs_to))
    goes_RT = torch.zeros(len(parts.pairs_to), num_tokens, dtype=torch.int32, device=tokens_P.device)
    goes_RT[to_P, tokens_P] = 1
    rows_P = goes_RT.cumsum(dim=1)[to_P, tokens_P] - 1
    tokens_N = torch.zeros(sum(parts.rows_to), dtype=torch.int64, device=tokens_P.device)
    tokens_N[rows_P + _on(tokens_P, np.repeat(_starts(parts.rows_to), parts.pairs_to))] = tokens_P
    return rows_P, tokens_N


def _starts(counts: Sequence[int]) -> Index:
    starts: Index = np.cumsum(counts, dtype=np.int64) - np.asarray(counts, dtype=np.int64)
    return starts


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
