"""What the routes take and give beside the views of llep/views.py."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llep.config import Mode, Settings, is_hot
from llep_server.errors import ErrorDetail

T = TypeVar("T")

MAX_TTL_S = 7 * 24 * 3600


class Page(BaseModel, Generic[T]):
    """A list. Ask for the next page with `cursor` = next_cursor."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    next_cursor: str | None = None


class Body(BaseModel):
    """What a route takes: nothing unknown, no infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


EngineField = Annotated[
    str | None, Field(max_length=200, description="which engine; not needed while there is only one")
]
ReasonField = Annotated[str, Field(max_length=500, description="why, for the audit trail")]
DryRunField = Annotated[bool, Field(description="say what would change, change nothing")]
Place = Annotated[int, Field(ge=0, lt=2**31)]


class Rollback(Body):
    revision: int = Field(ge=0, lt=2**62, description="whose settings are to hold again; 0: as the engines started")
    reason: ReasonField = ""
    dry_run: DryRunField = False


class Copy(Body):
    """One resident copy of an expert."""

    layer: Place = Field(description="the model's number of the layer")
    expert: Place
    rank: Place


class PlacementChange(Body):
    engine: EngineField = None
    replicas: list[Copy] | None = Field(None, max_length=10_000, description="null: the suggestion's")
    reason: ReasonField = ""
    dry_run: DryRunField = False


class PlacementRollback(Body):
    engine: EngineField = None
    reason: ReasonField = ""


class RecordingOrder(Body):
    engine: EngineField = None
    duration_s: float | None = Field(None, gt=0, le=24 * 3600, description="end after so many seconds")
    steps: int | None = Field(None, ge=1, lt=2**31, description="end after so many steps")
    max_bytes: int | None = Field(None, ge=1, lt=2**40, description="end at this size; record_max_bytes without it")
    reason: ReasonField = ""


class RecordingStop(Body):
    """Nothing to say: `{}`."""


class TuningOrder(Body):
    recording: str = Field(max_length=200, description="id of the recording to replay")
    base: dict[str, Any] = Field(
        {}, description="settings to start from, slots_per_rank too, laid over those of the engine that was recorded"
    )
    cost_model: str | None = Field(
        "h200", description="whose predicted seconds rank the settings: h100, h200 or b200; null ranks by loads alone"
    )
    ranks: int | None = Field(None, ge=1, le=4096, description="the recording's without it")
    ranks_per_node: int | None = Field(None, ge=1, le=4096, description="one node without it")


class Replay(Body):
    """What simulate takes to replay a recording."""

    model_config = ConfigDict(strict=True)

    recording: str = Field(max_length=200, description="id of a recording to replay, in place of tokens")
    settings: dict[str, Any] = Field({}, description="with recording: settings to replay it under")
    cost_model: str | None = None
    max_steps: int = Field(200, ge=1, le=5000, description="with recording: steps to replay, spread over it")
    ranks: int | None = Field(None, ge=1, le=4096, description="with recording: ranks, if not its own")
    ranks_per_node: int | None = Field(None, ge=1, le=4096)


class Balance(BaseModel):
    """Loads of the ranks, or over many batches their mean imbalance alone."""

    imbalance_ratio: float | None
    rank_loads: list[int] | None = None


class Simulation(BaseModel):
    """What a plan or a replay brings. `detail`: all that `llep plan simulate` or `llep simulate` prints."""

    source: Literal["tokens", "recording"]
    planner: str
    before: Balance
    after: Balance
    lends: int
    lend_bytes: int
    peak_memory_bytes: int = Field(description="most bytes that one rank needs beyond its own experts")
    predicted_gain_s: float | None = Field(description="seconds saved per plan or step; null without a cost model")
    detail: dict[str, Any]


class Operation(BaseModel):
    """A long job. state: waiting, running, done, failed, cancelled."""

    id: str
    kind: Literal["tuning"]
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    progress_ratio: float
    author: str
    arguments: dict[str, Any]
    created_s: float
    started_s: float | None = None
    ended_s: float | None = None
    result: dict[str, Any] | None = None
    error: ErrorDetail | None = None


class ModeChange(Body):
    mode: Mode = Field(description="off, observe (count only), shadow (plan, move nothing) or active")
    ttl_s: float | None = Field(
        None, gt=0, le=MAX_TTL_S, description="seconds after which the mode goes back by itself"
    )


class Version(BaseModel):
    version: str
    python: str


class Check(BaseModel):
    """One part that readiness needs."""

    name: Literal["scheduler", "store", "engines", "settings"]
    ok: bool
    message: str


class Live(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    ready: bool
    checks: list[Check]


class Unready(BaseModel):
    """The error body, with the checks beside it."""

    error: ErrorDetail
    request_id: str
    ready: Literal[False]
    checks: list[Check]


class Health(BaseModel):
    """A summary for people. The status code is 200 as long as the control plane itself answers."""

    status: Literal["ok", "degraded"]
    version: str
    checks: list[Check]
    keys: str = Field(description="'open', 'ok', or why the keys file's newest content is not in force")


def settings_patch_schema() -> dict[str, Any]:
    """JSON Schema of a merge patch: any of the keys that can change while serving, null to take a change back."""
    schema = Settings.model_json_schema()
    properties = {}
    for key, rule in schema["properties"].items():
        if is_hot(key):
            rule = {name: value for name, value in rule.items() if name not in ("default", "hot", "title")}
            named = schema["$defs"].get(rule.pop("$ref", "").rpartition("/")[2], {})
            description = rule.pop("description")
            properties[key] = {"description": description, "anyOf": [{**named, **rule}, {"type": "null"}]}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "examples": [{"imbalance_threshold": 1.5}],
    }
