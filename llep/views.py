"""What people see: the scheduler answers with these, the control plane serves them, the command line prints them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from llep.config import Mode


class View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EngineState(StrEnum):
    """starting: known, but not every rank has reported; live: all ranks fresh; stale: some rank has been silent."""

    STARTING = "starting"
    LIVE = "live"
    STALE = "stale"


class RankView(View):
    rank: int
    last_seen_s: float  # unix time
    held_revision: int
    live_revision: int
    memory_budget_bytes: int
    memory_used_bytes: int
    memory_peak_bytes: int


class EngineView(View):
    id: str
    model_name: str
    state: EngineState
    ep_size: int
    tp_size: int
    dp_size: int
    backend: str
    quantization: str
    dtype: str
    vllm_version: str
    llep_version: str
    num_layers: int
    num_experts: int
    top_k: int
    slots_per_rank: int
    bytes_per_slot: int
    mode: Mode  # the one that is live
    planner: str
    desired_revision: int
    held_revision: int  # the newest that all ranks have received; it goes live at the next step
    live_revision: int  # the one that every step runs under now
    live_since_step: int
    last_apply_error: str
    steps: dict[str, int]
    last_seen_s: float
    ranks: list[RankView]


class SettingView(View):
    key: str
    value: Any
    source: str  # default, file ..., environment, additional-config, revision N
    hot: bool
    description: str


class SettingsView(View):
    """Effective settings of one engine, or of an engine that would start with defaults when none is named."""

    revision: int
    engine: str | None
    settings: list[SettingView]


class AppliedView(View):
    """Where a revision stands. `revision` is the one that is live.

    state: live (since step), held (received by all ranks, live from the next step), sent, or away (the engine is stale
    and gets it when it is back).
    """

    engine: str
    state: str
    revision: int
    step: int | None


class SettingsChange(View):
    """The answer to a change. diff: key -> [before, after] of the engines addressed; a side on which they differ is a
    mapping from engine to value. Asking for what holds already makes no revision.
    """

    revision: int
    dry_run: bool
    engines: list[str] | None  # None: all, also those still to come
    diff: dict[str, list[Any]]
    applied: list[AppliedView]
    reverts_at_s: float | None = None  # unix time at which a mode with ttl goes back


class RankLoads(View):
    rank: int
    routed_tokens: int  # pairs that plain EP would compute here
    computed_tokens: int  # pairs computed here
    memory_budget_bytes: int
    memory_used_bytes: int
    memory_peak_bytes: int
    device_total_bytes: int = 0  # of the rank's device, or its part of the host's memory; 0: unknown
    device_free_bytes: int = 0


class WorthView(View):
    """What lending was worth in the window, measured: some steps that would have lent were computed by plain EP instead
    (probes; setting probe_ratio).
    """

    saved_s: float  # time inside the layers that lent; below 0: lending cost time
    gain_ratio: float | None  # of what plain EP would have taken; None: too few probes to tell it from chance
    error_ratio: float | None  # standard error of gain_ratio
    lent_steps: int
    probed_steps: int


class EngineLoads(View):
    """Loads over the last window_s (or what there is of it). Ratios are means over layer-steps; None without a step."""

    engine: str
    model_name: str
    window_s: float  # the window really covered
    tokens: int  # real tokens through the model
    layer_steps: int
    imbalance_ratio_before: float | None
    imbalance_ratio_after: float | None
    lends: int
    lend_bytes: int
    spilled_tokens: int
    decisions: dict[str, int]
    layer_seconds: float  # mean over ranks of the wall time inside MoE layers
    worth: WorthView | None = None  # None: no probe in the window
    ranks: list[RankLoads]


class HistoryPoint(View):
    """Loads of one engine between the point before and time_s (unix). Ratios are None without a layer-step."""

    time_s: float
    tokens: int
    layer_steps: int
    imbalance_ratio_before: float | None
    imbalance_ratio_after: float | None
    routed_R: list[int]
    computed_R: list[int]
    lends: int
    lend_bytes: int
    layer_seconds: float
    phase_seconds: dict[str, float] = {}  # mean over ranks
    predicted_gain_s: float = 0.0  # by the plans' cost model; 0 without one
    measured_gain_s: float | None = None  # against the steps computed by plain EP; None without one
    memory_used_R: list[int] = []  # at time_s
    memory_free_R: list[int] = []


class LoadMatrix(View):
    """Pairs by layer (rows, in order of `layers`) and rank or expert (columns) over the window."""

    engine: str
    by: str  # rank, expert
    stage: str  # before: as plain EP would compute them; after: as computed. Experts have before only
    window_s: float
    layers: list[int]  # the model's numbers
    values: list[list[int]]
    imbalance_ratio: list[float | None]  # of each layer's row; None without a pair


class HotExpert(View):
    engine: str
    layer: int  # the model's number
    expert: int
    home_rank: int
    tokens: int  # pairs in the window
    share: float  # of its layer's pairs
    load_ratio: float  # share / fair share
    hot_for_s: float  # for how long it has been among its layer's hottest without a break
    replica_ranks: list[int]


class LendView(View):
    expert: int
    src_rank: int
    dst_rank: int
    tokens: int


class PlanView(View):
    """One sampled layer-step."""

    engine: str
    id: int
    step: int
    layer: int  # the model's number
    phase: str
    time_s: float
    decision: str
    tokens: int
    routed: list[int]  # pairs of each rank under plain EP
    computed: list[int]
    imbalance_ratio_before: float
    imbalance_ratio_after: float
    lends: list[LendView]
    lend_bytes: int
    predicted_gain_s: float
    layer_seconds: float


class ReplicaView(View):
    layer: int  # the model's number
    expert: int
    rank: int
    share: float | None  # of its layer's pairs over the last windows


class PlacementView(View):
    """Resident replicas of one engine. state: none, ordered, filling, live."""

    engine: str
    replicas_setting: str  # off, suggest, apply
    number: int  # revision of the placement that is asked for; 0: none
    live_number: int
    state: str
    filled: int  # copies that are in place already
    replicas: list[ReplicaView]
    slots_per_rank: int
    used_slots: list[int]  # by rank
    bytes_per_slot: int
    problem: str = ""  # why this engine can have no resident replicas, and the way out


class RoomView(View):
    """What an engine without room for resident replicas would gain by some: as suggested with so many slots."""

    slots_per_rank: int
    bytes_per_rank: int
    replicas: int
    imbalance_ratio_before: float | None
    imbalance_ratio_after: float | None
    saving_s: float
    is_worth_it: bool


class PlacementSuggestion(View):
    """What the scheduler would do now, and what it is worth over horizon_s."""

    engine: str
    replicas: list[ReplicaView]
    added: list[ReplicaView]
    dropped: list[ReplicaView]
    imbalance_ratio_before: float | None  # forecast, mean over layers
    imbalance_ratio_after: float | None
    move_bytes: int
    move_s: float
    saving_s: float
    horizon_s: float
    is_worth_it: bool
    reason: str
    with_room: RoomView | None = None  # where the engine has no slots


class AdviceView(View):
    """verdict: worth_it, not_worth_it, not_enough_evidence. `patch` is the change of settings that is proposed."""

    engine: str
    verdict: str
    reason: str
    numbers: dict[str, float | None]
    patch: dict[str, Any]


class DecisionView(View):
    """One decision of the scheduler, also one to do nothing. kind: placement, thresholds, brake, advice."""

    id: int
    time_s: float
    engine: str
    kind: str
    outcome: str
    reason: str
    expected_gain_ratio: float | None
    inputs: dict[str, Any]
    revision: int | None  # that it made


class RevisionView(View):
    number: int
    time_s: float
    author: str
    reason: str
    engines: list[str] | None
    patch: dict[str, Any]
    diff: dict[str, list[Any]]


class RecordingView(View):
    """state: ordered, running, done, failed, deleted."""

    id: str
    engine: str
    state: str
    author: str
    reason: str
    created_s: float
    ended_s: float | None
    duration_s: float | None
    steps_wanted: int | None
    steps: int
    bytes: int
    problem: str
    data_bytes: int = 0  # of the tar that recording_read gives; 0 until the recording has ended


class EventKind(StrEnum):
    SETTINGS = "settings"
    MODE = "mode"
    PLACEMENT = "placement"
    BRAKE = "brake"
    RECORDING = "recording"
    ENGINE_UP = "engine_up"
    ENGINE_STALE = "engine_stale"
    ENGINE_RESTARTED = "engine_restarted"
    APPLY_FAILED = "apply_failed"
    ENGINE_ERROR = "engine_error"
    REPORT_REFUSED = "report_refused"
    STORE_SET_ASIDE = "store_set_aside"
    SCHEDULER_STARTED = "scheduler_started"
    CLOCK_JUMPED = "clock_jumped"


class Event(View):
    id: int
    time_s: float
    kind: EventKind
    engine: str | None
    author: str
    message: str
    data: dict[str, Any]


class SchedulerStatus(View):
    version: str
    pid: int
    started_s: float
    store_open: bool
    store_path: str
    store_problem: str = ""  # why the store isn't open, and the way out
    desired_revision: int
    engines: int
    reports_total: int
    reports_refused_total: int
    reports_refused: dict[str, int] = {}  # llep.scheduler.admit.Refusal -> count
    reports_lost: int = 0  # by the gaps in their numbers
    reports_doubled: int = 0
    orders_refused: dict[str, int] = {}  # rule that a placement broke -> count
    clock_jumps: int = 0  # of the machine's wall clock
