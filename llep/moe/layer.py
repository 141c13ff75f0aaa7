"""The step of one MoE layer on one rank: count, plan, lend, dispatch, experts, combine.

Shape letters: T tokens of this rank, K top-k, P pairs, H hidden, E experts, R ranks, G groups of pairs of one expert,
N token rows, B blocks of tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llep.errors import LlepError
from llep.moe.agreement import HELD_ALIKE, Evidence, RanksDisagree, odd_ranks
from llep.moe.dispatch import Dispatch, Index, Rows, Shares
from llep.moe.slots import NO_RESIDENTS, Copy, LendingPool, Residents, is_lendable, span
from llep.moe.workspace import Workspace
from llep.plan import Plan

Counts = npt.NDArray[np.int64]
Decide = Callable[[Counts], Plan]

# Where rows of an expert arrive, those of its own tokens wait for them if they are fewer: to go through the expert's
# weights twice would cost more than is won by not waiting (bench.layer).
FEW_ROWS = 256

# Places in what a rank tells of its batch: whether it is bad, a digest of its routing, digests of what all ranks hold
# alike (its settings, and the last plan that was agreed on), the batch's form, and pairs of each expert from HEAD on.
DIGEST, ALIKE, FORM = 1, 2, 2 + 1 + len(HELD_ALIKE)
HEAD = FORM + 4


class Experts(Protocol):
    """The experts that live on this rank, and how to compute with them, with resident replicas or with borrowed ones.

    `weights` are what is lent: tensors whose first dimension is local experts, each of them a stretch of memory.
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

        The first counts_G[0] rows are for row experts_G[0] of `bank` (`weights`, or a room's or a pool's tensors), and
        so on.
        """


class BadWeights(LlepError, ValueError):
    """Weights that can't be lent, or that differ from other ranks': no rank gets a layer."""

    code = "bad_weights"


class BadBatch(LlepError, ValueError):
    """A batch that this layer can't compute, on this rank or on another: nobody computes it."""

    code = "bad_batch"


class Waits(Protocol):
    """Something under way."""

    def wait(self) -> object: ...


class RowsUnderWay(Protocol):
    """Rows on their way here; `wait` returns them. is_here: whether it would do so at once."""

    @property
    def is_here(self) -> bool: ...
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

    settings_digest: int
    evidence: Evidence

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
        residents: Residents = NO_RESIDENTS,
    ) -> Waits: ...
    def start_copies(
        self,
        copies: Sequence[Copy],
        weights: Mapping[str, torch.Tensor],
        local_ids: Sequence[int],
        room: Mapping[str, torch.Tensor],
    ) -> Waits: ...
    def what_differs(self) -> str: ...


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
    """The experts of one layer, spread over an EP group. Making one is a collective: every rank enters it.

    home_rank[expert], local_ids[expert]: the rank that owns an expert and its row in that rank's weights. The pool and
    the workspace may be shared by all layers of a rank. Raises BadWeights, on every rank, for weights that can't be
    lent on one, and for ranks whose weights or homes of experts don't belong together.
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
        self.experts = experts
        self.transport = transport
        self.pool = pool
        self.home_rank = tuple(home_rank)
        self.local_ids = tuple(local_ids)
        self.num_experts = len(self.home_rank)
        self.workspace = workspace
        self.residents = NO_RESIDENTS
        self._check_together()

    def rehearse(self, hidden_TH: torch.Tensor, banks: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Compute once, with each bank, as many rows as any batch may bring at a time. Enters no collective."""
        rows_PH = self.workspace.buffers(hidden_TH).inputs
        gates_P = rows_PH.new_zeros(len(rows_PH))
        for bank in banks:
            self.experts.compute(bank, rows_PH, np.zeros(1, dtype=np.int64), np.array([len(rows_PH)]), gates_P)

    def forward_replicated(
        self,
        hidden_TH: torch.Tensor,
        gates_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        decide: Decide,
        *,
        agree: bool,
        compare: bool = True,
    ) -> LayerResult:
        """Every rank holds all tokens; returns this rank's partial sum [T, H], to be summed over ranks by the caller.

        agree: all ranks plan from counts that were made equal; must be the same on all ranks. Without it the plan
        must be plain EP, and nothing is compared. Raises BadBatch and RanksDisagree, with agree on every rank;
        compare: as below.
        """
        times = PhaseTimes()
        with times.measure("count"):
            if agree:
                gates_TK, ids_TK, counts_E = self._agree_on_routing(hidden_TH, gates_TK, ids_TK)
            else:
                mine = self._row(hidden_TH, gates_TK, ids_TK)
                counts_E = _counts(self._told(mine.values[None], mine))[0]
        with times.measure("plan"):
            plan = self._plan(decide, counts_E[None], compare=compare) if agree else decide(counts_E[None])
        lends = self._lend(plan)
        with times.measure("dispatch"):
            held = _Held.of(hidden_TH, gates_TK, ids_TK)
            own = Shares.of(plan, counts_E[None], ids_TK.shape[1]).own(
                self.transport.rank, 0, self.local_ids, self.residents.row_of
            )
            output_TH = torch.zeros_like(hidden_TH)
        with times.measure("compute"):
            self._add(output_TH, held, own.home, self.experts.weights)
            self._add(output_TH, held, own.resident, self.residents.bank)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            self._add(output_TH, held, own.lent, self.pool.tensors)
        return LayerResult(output_TH, plan, counts_E[None], times)

    def forward_sharded(
        self,
        hidden_TH: torch.Tensor,
        gates_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        decide: Decide,
        *,
        compare: bool = True,
    ) -> LayerResult:
        """Every rank holds its own tokens (also none); returns their full outputs [T, H].

        A token goes to a rank once, however many of its experts are there, and comes back as one weighted sum; what a
        rank computes of its own tokens does not travel. Raises BadBatch on every rank if one rank's batch is bad, and
        RanksDisagree if with its counts one tells of other settings, or of another plan in the layer before.
        compare: ranks compare counts, placement and plan of this layer too, before anything is sent by them; must be
        the same on all ranks. Without it gloo may end a rank that is sent more than it expects.
        """
        with self._explained():
            return self._forward_sharded(hidden_TH, gates_TK, ids_TK, decide, compare=compare)

    def _forward_sharded(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, decide: Decide, *, compare: bool
    ) -> LayerResult:
        times = PhaseTimes()
        with times.measure("count"):
            counts_RE = self._gather_counts(hidden_TH, gates_TK, ids_TK)
        with times.measure("plan"):
            plan = self._plan(decide, counts_RE, compare=compare)
        lends = self._lend(plan)
        with times.measure("dispatch"):
            output_TH = torch.zeros_like(hidden_TH)
            shares, at_a_time = self._part(Shares.of(plan, counts_RE, ids_TK.shape[1]), ids_TK)
        for block in range(len(shares.tokens_Q) // self.transport.size):
            tokens = slice(block * at_a_time, (block + 1) * at_a_time)
            with times.measure("dispatch"):
                held = _Held.of(hidden_TH[tokens], gates_TK[tokens], ids_TK[tokens])
                parts = shares.dispatch(self.transport.rank, block, self.local_ids, self.residents.row_of)
            self._compute_block(output_TH[tokens], held, parts, lends, times)
        lends.wait()
        return LayerResult(output_TH, plan, counts_RE, times)

    def _compute_block(
        self, output_TH: torch.Tensor, held: _Held, parts: Dispatch, lends: Waits, times: PhaseTimes
    ) -> None:
        """Add to output_TH what all ranks compute of one block of this rank's tokens, and do this rank's part.

        What others wait for comes first: this rank's own pairs are computed, in portions, while rows are under way, but
        for a few that are computed with those that arrive.
        """
        exchange, buffers = self.transport.exchange, self.workspace.buffers(output_TH)
        alone, together = _parted(parts.own.home, parts.arrived.home)
        with times.measure("dispatch"):
            sent_P = _on(output_TH, parts.send_order)
            rows_P, tokens_N = _rows_of(held.tokens_P[sent_P], parts, len(output_TH))
            labels_P2 = torch.stack((rows_P.to(torch.float32), held.gates_P[sent_P].to(torch.float32)), dim=1)
            labels = exchange(labels_P2, parts.pairs_to, parts.pairs_from)
            sent_NH = torch.index_select(held.rows_NH, 0, tokens_N, out=buffers.sent[: len(tokens_N)])
            rows = exchange(sent_NH, parts.rows_to, parts.rows_from, buffers.received)
        with times.measure("compute"):
            own = chain(
                self._portions(output_TH, held, alone, self.experts.weights),
                self._portions(output_TH, held, parts.own.resident, self.residents.bank),
            )
            while not rows.is_here and next(own, None):
                pass
        with times.measure("dispatch"):
            labels_P2, received_NH = labels.wait(), rows.wait()
            first_P = _on(output_TH, np.repeat(_starts(parts.rows_from), parts.pairs_from))
            arrived = _Held(received_NH, labels_P2[:, 0].to(torch.int64) + first_P, labels_P2[:, 1])
            sums_NH = buffers.sums[: len(received_NH)].zero_()
        with times.measure("compute"):
            self._add_together(sums_NH, arrived, parts.arrived.home, output_TH, held, together)
            self._add(sums_NH, arrived, parts.arrived.resident, self.residents.bank)
            if len(parts.arrived.lent):  # the weights may still be under way
                _exhaust(own)
        if len(parts.arrived.lent):
            with times.measure("lend"):
                lends.wait()
            with times.measure("compute"):
                self._add(sums_NH, arrived, parts.arrived.lent, self.pool.tensors)
        with times.measure("combine"):
            returned = exchange(sums_NH, parts.rows_from, parts.rows_to, buffers.sent)
        with times.measure("compute"):
            _exhaust(own)
        with times.measure("lend"):
            lends.wait()
        with times.measure("compute"):
            self._add(output_TH, held, parts.own.lent, self.pool.tensors)
        with times.measure("combine"):
            _add_rows(output_TH, tokens_N, returned.wait())

    def _add(self, sums_NH: torch.Tensor, held: _Held, rows: Rows, bank: Mapping[str, torch.Tensor]) -> None:
        _exhaust(self._portions(sums_NH, held, rows, bank))

    def _add_together(
        self,
        sums_NH: torch.Tensor,
        arrived: _Held,
        arrived_rows: Rows,
        output_TH: torch.Tensor,
        own: _Held,
        own_rows: Rows,
    ) -> None:
        """Add what this rank's experts make of arrived pairs to sums_NH, and of its own pairs to output_TH."""
        if not len(own_rows):
            self._add(sums_NH, arrived, arrived_rows, self.experts.weights)
            return
        inputs, first_own = self.workspace.buffers(sums_NH).inputs, len(arrived.tokens_P)
        # An own pair adds nothing to some arrived row of sums_NH; not all to the same, where a GPU would queue.
        some_P = torch.arange(len(own.tokens_P), device=sums_NH.device) % len(arrived.rows_NH)
        tokens_P = torch.cat((arrived.tokens_P, some_P))
        gates_P = torch.cat((arrived.gates_P, own.gates_P.to(arrived.gates_P.dtype)))
        shifted = Rows(own_rows.positions_P + first_own, own_rows.experts_G, own_rows.counts_G)
        for part in arrived_rows.joined(shifted).chunks(len(inputs)):
            positions_P = _on(sums_NH, part.positions_P)
            own_N = np.flatnonzero(part.positions_P >= first_own)
            places_N = _on(sums_NH, own_N)
            own_tokens_N = own.tokens_P[_on(sums_NH, part.positions_P[own_N] - first_own)]
            rows_P = tokens_P[positions_P]
            inputs_PH = torch.index_select(arrived.rows_NH, 0, rows_P, out=inputs[: len(part)])
            inputs_PH.index_copy_(0, places_N, own.rows_NH[own_tokens_N])
            outputs_PH = self.experts.compute(
                self.experts.weights, inputs_PH, part.experts_G, part.counts_G, gates_P[positions_P]
            )
            _add_rows(output_TH, own_tokens_N, outputs_PH[places_N])
            _add_rows(sums_NH, rows_P, outputs_PH.index_fill_(0, places_N, 0.0))
            del outputs_PH  # before the next ones are computed

    def _portions(
        self, sums_NH: torch.Tensor, held: _Held, rows: Rows, bank: Mapping[str, torch.Tensor]
    ) -> Iterator[bool]:
        """Add gate x expert(row) of each of these pairs to its row of sums_NH; True after each portion of them."""
        inputs = self.workspace.buffers(sums_NH).inputs
        for part in rows.chunks(len(inputs)):
            positions_P = _on(sums_NH, part.positions_P)
            rows_P = held.tokens_P[positions_P]
            inputs_PH = torch.index_select(held.rows_NH, 0, rows_P, out=inputs[: len(part)])
            gates_P = held.gates_P[positions_P]
            _add_rows(sums_NH, rows_P, self.experts.compute(bank, inputs_PH, part.experts_G, part.counts_G, gates_P))
            yield True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Rows that make no sense come from ranks that hold other counts or plans: say so where they do."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            if differs := self.transport.what_differs():
                raise RanksDisagree(f"{self.transport.where or 'one layer'}: {differs} ({error})") from error
            raise

    def _plan(self, decide: Decide, counts_QE: Counts, *, compare: bool) -> Plan:
        """The plan of counts that all ranks hold. compare: they make sure of it now, else with their next counts."""
        plan = decide(counts_QE)
        self.transport.evidence = evidence = Evidence(self.transport.where, counts_QE, plan)
        if compare and self.transport.size > 1:
            row = torch.tensor(evidence.digests, dtype=torch.int64, device=self.transport.device)
            evidence.compare(self.workspace.on_host(self.transport.gather(row, "comparison of plans")))
        return plan

    def _gather_counts(self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor) -> Counts:
        """Pairs of each rank for each expert [R, E]. Raises BadBatch on every rank if one rank's batch is bad."""
        mine = self._row(hidden_TH, gates_TK, ids_TK)
        return _counts(self._told(self.transport.gather(mine.values, "exchange of counts"), mine))

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

    def _agree_on_routing(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Counts]:
        """Rank 0's routing, if any rank's differs, else what everybody holds already; and pairs of each expert [E]."""
        mine = self._row(hidden_TH, gates_TK, ids_TK, is_replicated=True)
        rows_RN = self._told(self.transport.gather(mine.values, "comparison of routing"), mine)
        if (rows_RN[:, DIGEST] != rows_RN[0, DIGEST]).any():
            gates_TK, ids_TK = gates_TK.contiguous().clone(), ids_TK.contiguous().clone()
            self.transport.broadcast(gates_TK, "broadcast of routing")
            self.transport.broadcast(ids_TK, "broadcast of routing")
        return gates_TK, ids_TK, _counts(rows_RN)[0]

    def _row(
        self, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, *, is_replicated: bool = False
    ) -> _Row:
        """What this rank tells of its batch, and what is wrong with it. Costs no copy from the device.

        [HEAD + E + 2]: places as above, with one more below and one above the experts', for ids that are out of range.
        """
        device = self.transport.device
        problem = self._problem(hidden_TH, gates_TK, ids_TK)
        if problem:
            values = torch.zeros(HEAD + self.num_experts + 2, dtype=torch.int64, device=device)
            values[0] = 1
            return _Row(values, problem)
        flat = ids_TK.reshape(-1).to(torch.int64)
        places = (flat + 1).clamp_(0, self.num_experts + 1)
        counts = places.new_zeros(self.num_experts + 2).scatter_add_(0, places, torch.ones_like(places))
        tokens = len(ids_TK) if is_replicated else 0  # elsewhere each rank has its own
        form = (ids_TK.shape[1], hidden_TH.shape[1], hidden_TH.element_size(), tokens)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        digest = _digest(flat) if is_replicated else zero
        known = (self.transport.settings_digest, *self.transport.evidence.digests, *form)
        return _Row(torch.cat((zero, digest, torch.tensor(known, device=device), counts)), "")

    def _told(self, rows_RN: torch.Tensor, mine: _Row) -> Counts:
        """These ranks' rows, or this rank's alone, on the host: a layer's one copy. BadBatch if one is bad."""
        rows = self.workspace.on_host(rows_RN)
        outside_R = rows[:, HEAD] + rows[:, -1]
        own = self.transport.rank if len(rows) > 1 else 0
        if mine.problem or outside_R[own]:
            raise BadBatch(
                mine.problem
                or f"ids_TK: {outside_R[own]} ids are outside 0..{self.num_experts - 1}, this layer's experts"
            )
        bad = np.flatnonzero((rows[:, 0] != 0) | (outside_R != 0))
        if len(bad):
            ranks = ", ".join(map(str, bad))
            raise BadBatch(f"EP rank {ranks} refused its batch; see its log. Nobody computes this layer")
        self._check_alike(rows)
        forms_R4 = rows[:, FORM:HEAD]
        if (forms_R4 != forms_R4[0]).any():
            raise BadBatch(
                "EP ranks bring batches of different forms, (experts per token, hidden size, bytes per value, and "
                f"tokens where all hold the same) {forms_R4.tolist()}: they must be equal"
            )
        return rows

    def _check_alike(self, rows: Counts) -> None:
        """Raises RanksDisagree on every rank if one runs other settings, or had another plan in the layer before."""
        if odd := odd_ranks(rows[:, ALIKE].tolist()):
            raise RanksDisagree(
                f"EP rank {odd} runs other settings than the others at {self.transport.where or 'one layer'}: restart "
                "the engine with the same settings on all ranks"
            )
        self.transport.evidence.compare(rows[:, ALIKE + 1 : FORM])

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

    def _check_together(self) -> None:
        """Raises BadWeights on every rank, naming the tensor and the rule where one is at fault."""
        problem = _weights_problem(self.experts.weights, self.pool, self.transport.device)
        problem = problem or self._homes_problem()
        form = [(name, tuple(t.shape[1:]), t.stride()[1:], str(t.dtype)) for name, t in self.experts.weights.items()]
        row = [bool(problem), text_digest(repr(form)), text_digest(repr((self.home_rank, self.local_ids)))]
        rows_R3 = self.transport.gather(
            torch.tensor(row, dtype=torch.int64, device=self.transport.device), "comparison of weights' forms"
        ).cpu()
        if problem:
            raise BadWeights(problem)
        if bad := rows_R3[:, 0].nonzero().reshape(-1).tolist():
            raise BadWeights(f"EP rank {', '.join(map(str, bad))} refused its weights; see its log. Nobody has a layer")
        for what, column in (
            ("weights of the same names, shapes, strides and types", 1),
            ("the same homes of experts", 2),
        ):
            different = (rows_R3[:, column] != rows_R3[0, column]).nonzero().reshape(-1).tolist()
            if different:
                raise BadWeights(f"all EP ranks must have {what}: rank {different[0]} has others than rank 0")

    def _homes_problem(self) -> str:
        """What is wrong with home_rank and local_ids; '' if nothing is."""
        if len(self.local_ids) != self.num_experts:
            return f"local_ids has {len(self.local_ids)} experts, home_rank {self.num_experts}: they must be as many"
        mine = [row for home, row in zip(self.home_rank, self.local_ids, strict=True) if home == self.transport.rank]
        rows = len(next(iter(self.experts.weights.values())))
        if not all(0 <= home < self.transport.size for home in self.home_rank):
            return f"home_rank {self.home_rank}: each must be one of the group's {self.transport.size} ranks"
        if any(not 0 <= row < rows for row in mine) or len(set(mine)) < len(mine):
            return f"local_ids of this rank's experts are {mine}: each must be another one of its weights' {rows} rows"
        return ""

    def _lend(self, plan: Plan) -> Waits:
        return self.transport.start_lends(plan, self.experts.weights, self.local_ids, self.pool.tensors, self.residents)


class _Row(NamedTuple):
    """What a rank tells of its batch, and what is wrong with it."""

    values: torch.Tensor
    problem: str


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


def _parted(own: Rows, arrived: Rows) -> tuple[Rows, Rows]:
    """This rank's own rows to compute alone, and those to compute with the ones that arrive: FEW_ROWS says which."""
    is_together_G = np.isin(own.experts_G, arrived.experts_G) & (own.counts_G < FEW_ROWS)
    return own.of_experts(~is_together_G), own.of_experts(is_together_G)


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


def _digest(flat: torch.Tensor) -> torch.Tensor:
    """[1] int64 that differs, but for one chance in 2^63, where the routing does; wraps around by design."""
    weights = torch.arange(1, len(flat) + 1, device=flat.device) * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1
    return ((flat + 1) * (weights ^ (weights >> 29))).sum()[None]


def _exhaust(portions: Iterator[bool]) -> None:
    for _ in portions:
        pass


def _add_rows(output_TH: torch.Tensor, tokens_P: torch.Tensor, rows_PH: torch.Tensor) -> None:
    """Add each row to its token's output, in one order always: index_add_ on CUDA adds in any order."""
    if output_TH.is_cuda:
        output_TH.index_put_((tokens_P,), rows_PH, accumulate=True)
    else:
        output_TH.index_add_(0, tokens_P, rows_PH)


def _on(like: torch.Tensor, index: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(index).to(like.device)


def _weights_problem(weights: Mapping[str, torch.Tensor], pool: LendingPool, device: torch.device) -> str:
    """What is wrong with weights that are to be lent; '' if nothing is."""
    if not weights:
        return "weights is empty: it must hold at least one tensor whose first dimension is local experts"
    if weights.keys() != pool.tensors.keys():
        return f"weights are {sorted(weights)}, the pool's {sorted(pool.tensors)}: reserve the pool for these weights"
    rows = {name: len(tensor) if tensor.ndim else 0 for name, tensor in weights.items()}
    for name, tensor in weights.items():
        room = pool.tensors[name]
        if not is_lendable(tensor):
            return (
                f"weights[{name!r}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}: each expert must be "
                "a stretch of memory of its own, along the first dimension, so that it can be lent"
            )
        if rows[name] != next(iter(rows.values())):
            return f"weights {rows} have different first dimensions: each must be the local experts"
        if tensor.device.type != device.type:
            return f"weights[{name!r}] is on {tensor.device}: the EP group is on {device}"
        if tensor.shape[1:] != room.shape[1:] or tensor.dtype != room.dtype or span(tensor) != span(room):
            return (
                f"weights[{name!r}] {tuple(tensor.shape)} {tensor.dtype} does not fit the pool's "
                f"{tuple(room.shape)} {room.dtype}"
            )
    return ""


def text_digest(text: str) -> int:
    """56 bits: the same text has the same digest on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _counts(rows_RN: Counts) -> Counts:
    return rows_RN[:, HEAD + 1 : -1]
