"""Settings: every key, its default, its range and whether it can change while serving."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from llep.errors import SettingsError

ENVIRONMENT_PREFIX = "LLEP_"
# LLEP_* variables that are not settings: where things are, and who may come in.
NOT_SETTINGS = frozenset(
    {
        *("CONFIG", "ENGINE", "STATE_DIR", "SERVER", "KEY_FILE", "RAY_ADDRESS", "RAY_NAMESPACE", "REFUSAL_FILE"),
        "RECORD_FROM_START",
    }
)
# Settings that tuning tries over a recording.
SWEPT = ("planner", "imbalance_threshold", "min_chunk_tokens", "capacity_factor", "min_batch_tokens", "phases")


class Mode(StrEnum):
    """off: plain EP, nothing counted; observe: count only; shadow: plan, move nothing; active: plan and move."""

    OFF = "off"
    OBSERVE = "observe"
    SHADOW = "shadow"
    ACTIVE = "active"


class Planner(StrEnum):
    """quota: llep's own; least_loaded: the paper's; home: plain EP."""

    QUOTA = "quota"
    LEAST_LOADED = "least_loaded"
    HOME = "home"


class Phases(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class LendScope(StrEnum):
    """node: weights are lent within a node only."""

    ANY = "any"
    NODE = "node"


class Replicas(StrEnum):
    """suggest: the scheduler shows which resident replicas it would make; apply: it makes them."""

    OFF = "off"
    SUGGEST = "suggest"
    APPLY = "apply"


class MetricsLevel(StrEnum):
    OFF = "off"
    RANK = "rank"
    LAYER = "layer"
    LAYER_RANK = "layer_rank"


def parse_layers(value: Any) -> Any:
    """'all', or numbers and ranges as '0,3-7' or [0, "3-7"] -> 'all' or a sorted, comma-separated 'n' / 'a-b' text."""
    if value == "all":
        return value
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers: set[int] = set()
    for part in parts:
        first, dash, last = str(part).strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{part!r} is neither 'all' nor a layer number nor a range such as 3-7")
        if int(last or first) > 9999:
            raise ValueError(f"{part!r} is above the highest layer number allowed, 9999")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError("give 'all' or at least one layer number")
    return ",".join(_ranges(sorted(numbers)))


def _ranges(numbers: list[int]) -> Iterable[str]:
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number != previous + 1:
            yield str(start) if start == previous else f"{start}-{previous}"
            start = number if number is not None else start
        previous = number if number is not None else previous


@lru_cache(maxsize=64)
def layer_numbers(layers: str) -> frozenset[int] | None:
    """The numbers in a valid `layers` setting; None for 'all'."""
    if layers == "all":
        return None
    bounds = [part.partition("-") for part in layers.split(",")]
    return frozenset(n for first, _, last in bounds for n in range(int(first), int(last or first) + 1))


Layers = Annotated[str, BeforeValidator(parse_layers)]


def _hot(default: Any, description: str, **rules: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"hot": True}, **rules)


def _cold(default: Any, description: str, **rules: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"hot": False}, **rules)


class Settings(BaseModel):
    """What people may tune. Frozen: a change makes a new object under a new revision number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Mode = _hot(Mode.ACTIVE, "off, observe (count only), shadow (plan, move nothing) or active")
    planner: Planner = _hot(
        Planner.QUOTA, "who decides the step plans: quota (fewest lends), least_loaded (the paper's) or home (plain EP)"
    )
    imbalance_threshold: float = _hot(
        1.3, "lambda: max / mean of rank loads from which a layer is balanced; raising it balances less", ge=1, le=100
    )
    capacity_factor: float = _hot(
        1.0, "alpha: rank capacity / mean rank load; raising it lends less and lets ranks run hotter", ge=1, le=4
    )
    min_chunk_tokens: int = _hot(
        1024, "m: fewest pairs worth lending an expert for; raising it lends less", ge=1, le=65536
    )
    min_batch_tokens: int = _hot(
        2048, "batches with fewer tokens over all ranks are left to plain EP; raising it lends less", ge=0, le=1048576
    )
    phases: Phases = _hot(Phases.BOTH, "balance steps with prefill, pure decode steps, or both")
    layers: Layers = _hot("all", "'all', or numbers and ranges of model layers to balance, such as '0,3-7'")
    max_lend_bytes_per_layer: int = _hot(
        0, "most bytes of weights lent in one layer of one step over all ranks; 0 is no limit", ge=0
    )
    lend_scope: LendScope = _hot(LendScope.ANY, "any, or node: lend weights within a node only, never over the network")
    replicas: Replicas = _hot(
        Replicas.OFF, "resident replicas of experts that stay hot: off, suggest (show only) or apply"
    )
    replica_bytes_per_s: int = _hot(
        64 << 20, "most bytes of weights that a rank moves per second to fill resident replicas", ge=1 << 10, le=1 << 40
    )
    auto_tune: bool = _hot(
        False, "the scheduler itself sets imbalance_threshold and the token limits, from measurements"
    )
    auto_tune_min_threshold: float = _hot(1.1, "lowest imbalance_threshold that auto_tune may set", ge=1, le=100)
    auto_tune_max_threshold: float = _hot(3.0, "highest imbalance_threshold that auto_tune may set", ge=1, le=100)
    report_interval_s: float = _hot(1.0, "seconds between a worker's reports", ge=0.1, le=300)
    watchdog_s: int = _hot(60, "seconds a rank waits for the others before it stops loudly", ge=5, le=3600)
    metrics_level: MetricsLevel = _hot(MetricsLevel.RANK, "detail of /metrics: off, rank, layer or layer_rank")
    metrics_max_series: int = _hot(5000, "series per engine above which /metrics drops a level", ge=100, le=200_000)
    verify_sample_ratio: float = _hot(
        0.0, "share of steps whose lending layers are computed again by plain EP and compared", ge=0, le=1
    )
    probe_ratio: float = _hot(
        0.01, "share of steps that would lend computed by plain EP instead, to measure the gain; 0: none", ge=0, le=0.5
    )
    record_dir: str = _cold("", "folder in which rank 0 keeps recordings until they are fetched; empty: state folder")
    record_max_bytes: int = _hot(512 << 20, "most bytes of one recording", ge=1 << 20, le=1 << 40)
    decide_every_s: float = _cold(
        10.0,
        "seconds between the scheduler's decisions about this engine, and of one window of those that placements are "
        "decided from; lowering it follows the traffic faster, on fewer tokens",
        ge=1,
        le=60,
    )
    cost_model: str = _cold(
        "", "h100, h200, b200 or a file of `llep calibrate`: plans that it says don't pay are not taken; empty: all are"
    )
    slots_per_rank: int = _cold(4, "slots of the lending pool on each rank, shared by all layers", ge=0, le=4096)
    replica_slots_per_rank: int = _cold(
        0, "room for resident replicas on each rank, in experts over all layers; 0: none", ge=0, le=1 << 20
    )
    memory_budget_bytes: int = _cold(
        0, "bytes per rank for pool, replicas and workspace, slots are what fits; 0 takes slots_per_rank", ge=0
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("input should be a number")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Settings from plain values. Raises SettingsError naming the value, the rule and, for a typo, the nearest."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _explain(error) from None

    def changed(self, patch: Mapping[str, Any]) -> Self:
        """These settings with a merge patch applied (None puts a key back to its default). Cold keys are refused."""
        for key in patch:
            if key in type(self).model_fields and not is_hot(key):
                raise SettingsError(
                    f"{key} can't change while serving: set it at start, with --additional-config or {_variable(key)}",
                    param=key,
                )
        merged = {**self.model_dump(), **patch}
        return type(self).parse({key: value for key, value in merged.items() if value is not None})

    def dump(self) -> dict[str, Any]:
        """Plain JSON values by key."""
        return self.model_dump(mode="json")


def is_hot(key: str) -> bool:
    extra = Settings.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra["hot"])


def load_settings(
    additional_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> tuple[Settings, dict[str, str]]:
    """Settings at start and the source of each key.

    Order of precedence: additional_config (vLLM's `--additional-config '{"llep": {...}}'`), LLEP_* environment, the
    YAML file named by LLEP_CONFIG, default. Raises SettingsError for what is unknown, mistyped or out of range.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources = dict.fromkeys(Settings.model_fields, "default")
    if path := environ.get("LLEP_CONFIG"):
        _merge(values, sources, _read_file(Path(path)), f"file {path}")
    _merge(values, sources, _read_environment(environ), "environment")
    _merge(values, sources, additional_config or {}, "additional-config")
    return Settings.parse(values), sources


def _merge(values: dict[str, Any], sources: dict[str, str], new: Mapping[str, Any], source: str) -> None:
    try:
        Settings.parse(new)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error.message}", param=error.param) from None
    values.update(new)
    sources.update(dict.fromkeys(new, source))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"LLEP_CONFIG={path} can't be read: {reason}", param="LLEP_CONFIG") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"LLEP_CONFIG={path} must hold 'key: value' lines, got {type(values).__name__}")
    # YAML reads a bare `off` as false.
    return {key: "off" if value is False and _can_be_off(key) else value for key, value in values.items()}


def _can_be_off(key: str) -> bool:
    info = Settings.model_fields.get(key)
    return info is not None and info.annotation in (Mode, Replicas, MetricsLevel)


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = (name for name in environ if name.startswith(ENVIRONMENT_PREFIX))
    keys = {name: name.removeprefix(ENVIRONMENT_PREFIX) for name in names}
    return {
        key.lower(): environ[name]
        for name, key in keys.items()
        if not (key in NOT_SETTINGS or key.startswith("SERVER_"))
    }


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """['mode=off', 'layers=0,3-7'] -> a merge patch; 'key=null' puts the key back to its default."""
    patch: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(f"{assignment!r} is not of the form key=value", param=key)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:  # NaN, Infinity, 1e999: JSON has no word for them
            raise SettingsError(f"{key}={text} is not valid: it must be finite", param=key) from None
        patch[key.strip()] = value
    return patch


def _explain(error: ValidationError) -> SettingsError:
    first = error.errors(include_url=False, include_context=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0.0)[0]
        return SettingsError(f"unknown setting {key!r}; did you mean {nearest!r}?", param=key)
    rule = first["msg"].removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:]
    return SettingsError(f"{key}={first['input']!r} is not valid: {rule} (default {_default(key)!r})", param=key)


def _default(key: str) -> Any:
    return Settings().dump().get(key)


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper()
