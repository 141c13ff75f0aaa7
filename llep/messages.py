"""What processes tell each other: reports go up, directives come down. Typed, compact binary (msgpack), no pickle.

worker --Report--> agent --reports--> Scheduler, and the other way round: Directive. Scheduler --SchedulerSnapshot-->
control plane, once per scrape. Each travels in an envelope with its protocol and checksum.

Everything counted in a Report is cumulative since the worker started, so a lost or doubled report does no harm: the
next one says it all. Rank 0 speaks for its EP group about what all ranks hold alike (loads, decisions, lends); every
rank speaks for itself about time and memory. Only real tokens count: no padding, dummy, profiling or warm-up step.

Shape letters: P phases of steps (prefill, decode), L MoE layers (in order of layer_numbers), R ranks, E experts,
S stages (before, after balancing), K links (node, network).
"""

from __future__ import annotations

import operator
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from llep.cost import CostModel

PROTOCOL = 3

# Upper bounds of histogram buckets; one more bucket follows for everything above.
IMBALANCE_BUCKETS = (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
SECONDS_BUCKETS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STAGES = ("before", "after")
STEP_PHASES = ("prefill", "decode")
LINKS = ("node", "network")
LAYER_PHASES = ("count", "plan", "lend", "dispatch", "compute", "combine")
MOST_PLANS = 16  # sampled plans in one report


class ProtocolMismatch(ValueError):
    """The other side speaks another protocol."""


class Array(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A numpy array on the wire."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Self:
        return cls(array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        """A read-only view of the data. Raises ValueError if shape, type and length disagree."""
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype)).reshape(self.shape)


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an engine is; equal on all its ranks but for setting_sources, fixed while it runs."""

    engine: str
    model_name: str
    llep_version: str
    vllm_version: str
    backend: str  # torch device type: cpu, cuda
    quantization: str  # 'none' when weights are as trained
    dtype: str
    ep_size: int
    tp_size: int
    dp_size: int
    layer_numbers: tuple[int, ...]  # the model's numbers of its MoE layers
    num_experts: int
    top_k: int
    slots_per_rank: int
    bytes_per_slot: int
    replica_slots_per_rank: int  # resident replicas that each rank has room for, over all layers
    ranks_per_node: int  # ranks 0..n-1 are node 0 and so on; 0: one node
    max_model_len: int
    settings: dict[str, Any]  # at start, before any change at run time
    setting_sources: dict[str, str]  # machines may have the same from a file, from the environment
    cost_model: CostModel | None = None  # without one plans predict no gain


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """counts has one entry per bucket (not cumulative over buckets) and one for everything above."""

    counts: tuple[int, ...]
    sum: float

    def plus(self, other: Histogram) -> Histogram:
        return Histogram(tuple(map(operator.add, self.counts, other.counts)), self.sum + other.sum)


class PlanSample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One layer of one step that moved something, as an example of what is done."""

    id: int  # 1, 2, 3, ...
    step: int
    layer: int  # its place in layer_numbers
    phase: str  # of the step
    time_s: float  # unix time
    decision: str  # llep.plan.Decision
    tokens: int
    routed_R: tuple[int, ...]  # pairs of each rank under plain EP
    computed_R: tuple[int, ...]
    lends: tuple[tuple[int, int, int, int], ...]  # expert, from rank, to rank, pairs
    predicted_gain_s: float
    layer_seconds: float  # wall time of rank 0 inside the layer


class GroupLoads(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What all ranks of an EP group hold alike; reported by rank 0."""

    tokens_PL: Array  # int64: real tokens that went through each layer
    routed_PLE: Array  # int64: pairs routed to each expert
    routed_PLR: Array  # int64: pairs that plain EP would compute on each rank
    computed_PLR: Array  # int64: pairs computed on each rank
    layer_steps_PL: Array  # int64: steps with at least one real token
    imbalance_sum_PLS: Array  # float64: sum over those steps of the imbalance ratio
    balancedness_sum_PLS: Array  # float64: sum over those steps of mean / max
    imbalance_histograms: tuple[Histogram, Histogram]  # by stage, over layers and steps, IMBALANCE_BUCKETS
    decisions: dict[str, dict[str, int]]  # STEP_PHASES -> llep.plan.Decision -> layer-steps
    spilled_in_PR: Array  # int64: pairs computed for other home ranks
    spilled_out_PR: Array  # int64: pairs computed elsewhere
    lends_PL: Array  # int64: over all ranks
    lends_in_PRK: Array  # int64
    lends_out_PRK: Array  # int64
    bytes_per_lend: int
    predicted_gain_s: dict[str, float]  # STEP_PHASES -> sum of what plans predict; 0 without a cost model
    last_plan_time_s: float  # unix time of the last decision, also 'do nothing'; 0 before the first
    home_rank_LE: Array  # int16, fixed while the engine runs
    plans: tuple[PlanSample, ...]  # the newest, by id

    @property
    def decisions_in_both(self) -> Counter[str]:
        """Layer-steps by decision, over both phases of steps."""
        return sum(map(Counter, self.decisions.values()), Counter())


class Worth(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What lending is worth, measured: some of the steps that would lend are computed by plain EP instead.

    seconds: wall time of this rank inside the layers that lent, or would have. pairs: those of the most loaded rank
    under plain EP, so that sizes of batches cancel out. steps: that had such a layer.
    """

    lent_s: float = 0.0
    lent_pairs: int = 0
    lent_steps: int = 0
    probed_s: float = 0.0
    probed_pairs: int = 0
    probed_steps: int = 0

    @property
    def gain_s(self) -> float | None:
        """Seconds that lending has saved so far; None before the first probe."""
        if not self.probed_pairs:
            return None
        return self.lent_pairs * (self.probed_s / self.probed_pairs) - self.lent_s


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report", gc=False):
    """One rank's view at one moment."""

    protocol: int
    info: EngineInfo
    rank: int
    incarnation: str  # new for each start of the engine; equal on all its ranks
    seq: int  # 1, 2, 3, ... for each (incarnation, rank)
    time_s: float  # unix time
    counting_s: float  # seconds since this rank began to count
    step: int  # steps since start, dummy ones included
    steps: dict[str, int]  # STEP_PHASES -> real steps
    held_revision: int  # newest settings revision this rank has received
    live_revision: int  # the revision the EP group runs
    live_settings: dict[str, Any]  # those of live_revision, complete: the truth if the scheduler's store is lost
    live_since_step: int
    live_since_time_s: float
    last_apply_error: str  # '' or why the newest directive was refused
    live_placement: int  # number of the placement that is switched on; 0: none
    filled_placement: int  # copies that are in place already, of the placement under way
    phase_seconds: dict[str, dict[str, Histogram]]  # STEP_PHASES -> LAYER_PHASES, SECONDS_BUCKETS
    layer_seconds: dict[str, float]  # STEP_PHASES -> wall time inside MoE layers
    worth: dict[str, Worth]  # STEP_PHASES -> what lending is worth, by this rank's clock
    device_total_bytes: int  # this rank's device, or its part of the host's memory; 0: unknown
    device_free_bytes: int
    memory_budget_bytes: int  # reserved for llep on this rank
    memory_used_bytes: int  # workspace, and slots in use in the last lending step
    memory_peak_bytes: int
    replica_bytes: int  # of memory_budget_bytes, reserved for resident replicas
    errors: dict[str, int]  # 'component/type' -> count
    group: GroupLoads | None  # rank 0 only


class PlacementOrder(msgspec.Struct, frozen=True):
    """Which resident replicas an engine should have. number: the revision in which it was ordered."""

    number: int
    replicas: tuple[tuple[int, int, int], ...]  # (place in layer_numbers, expert, rank)
    bytes_per_s: int  # most bytes that a rank sends, or receives, per second to fill them


class RecordingOrder(msgspec.Struct, frozen=True):
    """Record the counts of every step, from the step on at which the revision with this order goes live."""

    id: str
    until_s: float  # unix time at which it ends
    max_steps: int  # 0: no limit
    max_bytes: int


class Directive(msgspec.Struct, frozen=True, kw_only=True, tag="directive", gc=False):
    """What the scheduler tells the workers of one engine. `settings` is complete; revision 0 is the start."""

    protocol: int
    engine: str
    revision: int
    settings: dict[str, Any]
    placement: PlacementOrder | None = None  # None: no resident replicas
    recording: RecordingOrder | None = None


class EngineName(msgspec.Struct, frozen=True):
    engine: str


class ReportHeader(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the agent reads of a Report that it passes on: cheap, for the counts are skipped."""

    info: EngineName
    rank: int
    incarnation: str
    seq: int
    held_revision: int
    live_settings: dict[str, Any]


class RankSnapshot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What /metrics shows of each rank's newest Report; names are those of Report. phase_seconds: over both phases of
    steps.
    """

    rank: int
    held_revision: int
    last_apply_error: str
    phase_seconds: dict[str, Histogram]
    layer_seconds: dict[str, float]
    device_total_bytes: int
    device_free_bytes: int
    memory_budget_bytes: int
    memory_used_bytes: int
    memory_peak_bytes: int
    errors: dict[str, int]


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One engine as the scheduler knows it, by the newest reports. A scrape of many engines takes as long as what is in
    here, so plans and what is counted per expert are not.
    """

    engine: str
    state: str  # llep.views.EngineState
    desired_revision: int
    last_seen_s: float  # unix time of the newest report of any rank
    refused: dict[str, int]  # reason -> reports refused
    speaker: Report | None  # of the lowest rank; None before the first report
    ranks: tuple[RankSnapshot, ...]  # in order of rank
    hot_ratios: tuple[float, ...]  # load / fair load of the hottest experts lately, in falling order


class SchedulerSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot", gc=False):
    """All that a scrape of /metrics needs."""

    protocol: int
    time_s: float
    store_open: bool
    refused: dict[str, int]  # reason -> reports refused, of no engine that is known
    engines: tuple[EngineSnapshot, ...]


class _SnapshotPieces(msgspec.Struct, frozen=True, tag="snapshot"):
    """A SchedulerSnapshot whose engines are not decoded yet."""

    time_s: float
    store_open: bool
    refused: dict[str, int]
    engines: tuple[msgspec.Raw, ...]


class _Envelope(msgspec.Struct, frozen=True, gc=False):
    """What is sent: a message as msgpack, and its checksum, for a flipped bit must not pass for a count.

    Up to protocol 2 the message itself was sent: its protocol is read all the same.
    """

    protocol: int
    checksum: int = 0  # CRC-32 of body
    body: memoryview = memoryview(b"")


_nothing = Array("<i8", (0,), b"")
_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_header_decoder = msgspec.msgpack.Decoder(ReportHeader)
_report_decoder = msgspec.msgpack.Decoder(Report)
_directive_decoder = msgspec.msgpack.Decoder(Directive)
_pieces_decoder = msgspec.msgpack.Decoder(_SnapshotPieces)
_engine_decoder = msgspec.msgpack.Decoder(EngineSnapshot)


def encode(message: Report | Directive | SchedulerSnapshot) -> bytes:
    body = _encoder.encode(message)
    return _encoder.encode(_Envelope(message.protocol, zlib.crc32(body), memoryview(body)))


def is_one_engine(one: EngineInfo, other: EngineInfo) -> bool:
    """Whether two ranks of one engine may say so of themselves."""
    return one == msgspec.structs.replace(other, setting_sources=one.setting_sources)


def rank_snapshot(report: Report) -> RankSnapshot:
    return RankSnapshot(
        rank=report.rank,
        held_revision=report.held_revision,
        last_apply_error=report.last_apply_error,
        phase_seconds=sum_by_phase(report.phase_seconds.values()),
        layer_seconds=report.layer_seconds,
        device_total_bytes=report.device_total_bytes,
        device_free_bytes=report.device_free_bytes,
        memory_budget_bytes=report.memory_budget_bytes,
        memory_used_bytes=report.memory_used_bytes,
        memory_peak_bytes=report.memory_peak_bytes,
        errors=report.errors,
    )


def sum_by_phase(each: Iterable[dict[str, Histogram]]) -> dict[str, Histogram]:
    """The sums of histograms of the same name."""
    found: dict[str, Histogram] = {}
    for histograms in each:
        for phase, histogram in histograms.items():
            found[phase] = histogram if phase not in found else found[phase].plus(histogram)
    return found


def without_experts(report: Report) -> Report:
    """The report without plans and what it counts per expert."""
    if report.group is None:
        return report
    group = msgspec.structs.replace(report.group, routed_PLE=_nothing, home_rank_LE=_nothing, plans=())
    return msgspec.structs.replace(report, group=group)


def decode_header(data: bytes) -> ReportHeader:
    """Raises ValueError if `data` is garbled; the protocol is for the scheduler to judge."""
    envelope = _envelope_decoder.decode(data)
    return _header_decoder.decode(_intact(envelope) if envelope.body else data)


def decode_report(data: bytes) -> Report:
    """Raises ProtocolMismatch if `data` is of another protocol, ValueError (as msgspec's errors are) if garbled."""
    return _report_decoder.decode(_open(data))


def decode_directive(data: bytes) -> Directive:
    """Raises ProtocolMismatch if `data` is of another protocol, ValueError if garbled."""
    return _directive_decoder.decode(_open(data))


def decode_snapshot(data: bytes) -> SchedulerSnapshot:
    """Raises ProtocolMismatch if `data` is of another protocol, ValueError if garbled."""
    # Engine by engine: in one piece no other thread would run for as long as 64 of them take.
    pieces = _pieces_decoder.decode(_open(data))
    engines = tuple(map(_engine_decoder.decode, pieces.engines))
    return SchedulerSnapshot(
        protocol=PROTOCOL,
        time_s=pieces.time_s,
        store_open=pieces.store_open,
        refused=pieces.refused,
        engines=engines,
    )


def _open(data: bytes) -> memoryview:
    """The message in its envelope. First of all its protocol: one of another protocol need not have our fields."""
    envelope = _envelope_decoder.decode(data)
    if envelope.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"protocol {envelope.protocol} is not {PROTOCOL}: engine and scheduler run different versions of llep"
        )
    return _intact(envelope)


def _intact(envelope: _Envelope) -> memoryview:
    if zlib.crc32(envelope.body) != envelope.checksum:
        raise ValueError("its checksum is another: garbled on the way")
    return envelope.body
