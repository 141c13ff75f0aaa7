"""Which reports are believed: pure checks of one report against what its engine said before."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.errors import SettingsError
from llep.messages import (
    IMBALANCE_BUCKETS,
    LAYER_PHASES,
    LINKS,
    MOST_PLANS,
    SECONDS_BUCKETS,
    STAGES,
    STEP_PHASES,
    Array,
    EngineInfo,
    GroupLoads,
    Histogram,
    PlanSample,
    ProtocolMismatch,
    Report,
    Worth,
    decode_report,
)
from llep.plan import Decision

Counters = dict[str, npt.NDArray[Any]]

LARGEST_COUNT = 1 << 62
LONGEST_NAME = 200
LONGEST_TEXT = 10_000
MOST_REPORT_BYTES = 64 << 20
MOST_ERROR_KINDS = 64
_LARGEST = {"ep_size": 1 << 14, "tp_size": 1 << 14, "dp_size": 1 << 14, "num_experts": 1 << 16, "top_k": 1 << 16}
_LARGEST_NUM_LAYERS = 10_000


class Refusal(StrEnum):
    """Why a report is refused. A closed set: these are metric labels."""

    GARBLED = "garbled"  # not a report at all
    PROTOCOL = "protocol"  # of another version of llep
    ENGINE = "engine"  # describes an engine that can't be, or another than before
    REPLACED = "replaced"  # from an engine that another of the same name has replaced
    RANK = "rank"  # from a rank that the engine doesn't have
    ORDER = "order"  # not newer than what the rank said before
    SHAPE = "shape"  # arrays or keys that don't fit the engine
    COUNT = "count"  # negative, not finite, absurdly large, or less than before
    SUMS = "sums"  # what was computed isn't what was routed
    SETTINGS = "settings"  # settings that this llep can't read


class Refused(ValueError):
    """The report is not believed; what was known stays."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(data: bytes) -> Report:
    """The report in `data`. Raises Refused."""
    if len(data) > MOST_REPORT_BYTES:
        raise Refused(Refusal.GARBLED, f"{len(data)} bytes, above {MOST_REPORT_BYTES}")
    try:
        return decode_report(data)
    except ProtocolMismatch as error:
        raise Refused(Refusal.PROTOCOL, str(error)) from None
    except ValueError as error:
        raise Refused(Refusal.GARBLED, str(error)) from None


def start_settings(info: EngineInfo) -> Settings:
    """Settings at start of an engine that can be. Raises Refused."""
    for name in (info.engine, info.model_name):
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise Refused(
                Refusal.ENGINE, f"the name {name[:LONGEST_NAME]!r} is not 1 to {LONGEST_NAME} printable characters"
            )
    for key, largest in _LARGEST.items():
        if not 1 <= getattr(info, key) <= largest:
            raise Refused(Refusal.ENGINE, f"{key}={getattr(info, key)} is not between 1 and {largest}")
    for key in ("replica_slots_per_rank", "ranks_per_node"):
        if not 0 <= getattr(info, key) <= LARGEST_COUNT:
            raise Refused(Refusal.ENGINE, f"{key}={getattr(info, key)} is not between 0 and 2^62")
    if not 1 <= len(info.layer_numbers) <= _LARGEST_NUM_LAYERS:
        raise Refused(
            Refusal.ENGINE, f"{len(info.layer_numbers)} MoE layers is not between 1 and {_LARGEST_NUM_LAYERS}"
        )
    return parse_settings(info.settings)


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Raises Refused."""
    try:
        return Settings.parse(values)
    except SettingsError as error:
        raise Refused(Refusal.SETTINGS, error.message) from None


def counters(report: Report) -> Counters:
    """Every cumulative number of a report by name, each of the shape the engine's info asks for. Raises Refused."""
    info = report.info
    if not 0 <= report.rank < info.ep_size:
        raise Refused(Refusal.RANK, f"rank {report.rank} of {info.ep_size}")
    if (report.group is not None) != (report.rank == 0):
        raise Refused(
            Refusal.SHAPE, f"rank {report.rank} {'speaks' if report.group else 'does not speak'} for its group"
        )
    if len(report.last_apply_error) > LONGEST_TEXT or len(report.incarnation) > LONGEST_NAME:
        raise Refused(
            Refusal.SHAPE, f"a text of more than {LONGEST_TEXT} characters or a name of more than {LONGEST_NAME}"
        )
    _check_gauges(report)
    found: Counters = {
        "step": _number(report.step),
        "held_revision": _number(report.held_revision),
        "live_revision": _number(report.live_revision),
        **_of_keys("steps", report.steps, STEP_PHASES),
        **_of_keys("layer_seconds", report.layer_seconds, STEP_PHASES),
        **_worth(report.worth),
        **_errors(report.errors),
    }
    for phase, histogram in report.phase_seconds.items():
        if phase not in LAYER_PHASES:
            raise Refused(Refusal.SHAPE, f"phase_seconds has the key {phase!r}, not one of {', '.join(LAYER_PHASES)}")
        found |= _histogram(f"phase_seconds.{phase}", histogram, len(SECONDS_BUCKETS) + 1)
    if report.group is not None:
        found |= _group_counters(report.group, info)
    return found


def check_counters(new: Counters, before: Counters) -> None:
    """Raises Refused unless every number is finite, within reason and not less than it was."""
    for name, values in new.items():
        if not np.all(np.isfinite(values)) or np.any(values < 0) or np.any(values > LARGEST_COUNT):
            raise Refused(Refusal.COUNT, f"{name} holds {_worst(values)}, not between 0 and 2^62")
    for name, values in before.items():
        if name not in new or np.any(new[name] < values):
            raise Refused(Refusal.COUNT, f"{name} is less than it was: counts are cumulative since the engine started")


def check_sums(found: Counters, top_k: int) -> None:
    """Raises Refused unless, in every phase and layer, routed and computed pairs are equal, namely tokens x top-k."""
    pairs_PL = found["tokens_PL"] * top_k
    for name in ("routed_PLE", "routed_PLR", "computed_PLR"):
        sums_PL = found[name].sum(axis=2)
        if not np.array_equal(sums_PL, pairs_PL):
            phase, layer = (int(index) for index in np.argwhere(sums_PL != pairs_PL)[0])
            raise Refused(
                Refusal.SUMS,
                f"{name} sums to {sums_PL[phase, layer]} in {STEP_PHASES[phase]}, layer place {layer}, "
                f"tokens x top-k is {pairs_PL[phase, layer]}",
            )


def _group_counters(group: GroupLoads, info: EngineInfo) -> Counters:
    P, L, R, E, S, K = (
        *(len(STEP_PHASES), len(info.layer_numbers), info.ep_size, info.num_experts, len(STAGES), len(LINKS)),
    )
    int64, float64 = "<i8", "<f8"
    found = {
        "tokens_PL": _array("tokens_PL", group.tokens_PL, int64, (P, L)),
        "routed_PLE": _array("routed_PLE", group.routed_PLE, int64, (P, L, E)),
        "routed_PLR": _array("routed_PLR", group.routed_PLR, int64, (P, L, R)),
        "computed_PLR": _array("computed_PLR", group.computed_PLR, int64, (P, L, R)),
        "layer_steps_PL": _array("layer_steps_PL", group.layer_steps_PL, int64, (P, L)),
        "imbalance_sum_PLS": _array("imbalance_sum_PLS", group.imbalance_sum_PLS, float64, (P, L, S)),
        "balancedness_sum_PLS": _array("balancedness_sum_PLS", group.balancedness_sum_PLS, float64, (P, L, S)),
        "spilled_in_R": _array("spilled_in_R", group.spilled_in_R, int64, (R,)),
        "spilled_out_R": _array("spilled_out_R", group.spilled_out_R, int64, (R,)),
        "lends_L": _array("lends_L", group.lends_L, int64, (L,)),
        "lends_in_RK": _array("lends_in_RK", group.lends_in_RK, int64, (R, K)),
        "lends_out_RK": _array("lends_out_RK", group.lends_out_RK, int64, (R, K)),
        "bytes_per_lend": _number(group.bytes_per_lend),
        "predicted_gain_s": _number(group.predicted_gain_s),
        **_of_keys("decisions", group.decisions, tuple(Decision)),
    }
    home_rank_LE = _array("home_rank_LE", group.home_rank_LE, "<i2", (L, E))
    if home_rank_LE.size and not 0 <= home_rank_LE.min() <= home_rank_LE.max() < R:
        raise Refused(Refusal.COUNT, f"home_rank_LE holds a rank that is not between 0 and {R - 1}")
    for stage, histogram in zip(STAGES, group.imbalance_histograms, strict=True):
        found |= _histogram(f"imbalance.{stage}", histogram, len(IMBALANCE_BUCKETS) + 1)
    _check_plans(group.plans, info)
    return found


def _check_plans(plans: tuple[PlanSample, ...], info: EngineInfo) -> None:
    ids = [plan.id for plan in plans]
    if len(plans) > MOST_PLANS or ids != sorted(set(ids)):
        raise Refused(Refusal.SHAPE, f"plans has {len(plans)} samples, above {MOST_PLANS} or not by growing id")
    for plan in plans:
        is_known = plan.decision in tuple(Decision) and plan.phase in STEP_PHASES
        is_fitting = len(plan.routed_R) == len(plan.computed_R) == info.ep_size
        if not (is_known and is_fitting and 0 <= plan.layer < len(info.layer_numbers)):
            raise Refused(Refusal.SHAPE, f"plan {plan.id} has a decision, a phase, ranks or a layer that don't fit")
        limits = (info.num_experts, info.ep_size, info.ep_size, LARGEST_COUNT)
        if any(not 0 <= v < limit for lend in plan.lends for v, limit in zip(lend, limits, strict=True)):
            raise Refused(Refusal.COUNT, f"plan {plan.id} lends an expert or to a rank that is not there")
        numbers = (plan.id, plan.step, plan.time_s, plan.tokens, plan.layer_seconds, *plan.routed_R, *plan.computed_R)
        check_counters({f"plan {plan.id}": np.array([*numbers, abs(plan.predicted_gain_s)], dtype=np.float64)}, {})


def _worth(worth: Mapping[str, Worth]) -> Counters:
    if unknown := worth.keys() - set(STEP_PHASES):
        raise Refused(Refusal.SHAPE, f"worth has the key {sorted(unknown)[0]!r}, not one of {', '.join(STEP_PHASES)}")
    return {f"worth.{phase}": _number(msgspec.structs.astuple(value)) for phase, value in worth.items()}


def _array(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    if array.dtype != dtype or array.shape != shape or len(array.data) != num_bytes:
        raise Refused(
            Refusal.SHAPE,
            f"{name} is {array.dtype} {list(array.shape)} of {len(array.data)} bytes, not {dtype} {list(shape)}",
        )
    return array.numpy()


def _of_keys(name: str, values: Mapping[str, float], keys: tuple[str, ...]) -> Counters:
    if unknown := values.keys() - set(keys):
        raise Refused(Refusal.SHAPE, f"{name} has the key {sorted(unknown)[0]!r}, not one of {', '.join(keys)}")
    return {f"{name}.{key}": _number(value) for key, value in values.items()}


def _errors(errors: Mapping[str, int]) -> Counters:
    if len(errors) > MOST_ERROR_KINDS:
        raise Refused(Refusal.SHAPE, f"errors has {len(errors)} keys, above {MOST_ERROR_KINDS}")
    return {f"errors.{key}": _number(value) for key, value in errors.items()}


def _histogram(name: str, histogram: Histogram, num_buckets: int) -> Counters:
    if len(histogram.counts) != num_buckets:
        raise Refused(Refusal.SHAPE, f"{name} has {len(histogram.counts)} buckets, not {num_buckets}")
    return {f"{name}.counts": _number(histogram.counts), f"{name}.sum": _number(histogram.sum)}


def _check_gauges(report: Report) -> None:
    """What may fall again, but not below nothing."""
    gauges = (
        "time_s",
        "counting_s",
        "live_since_step",
        "live_since_time_s",
        "live_placement",
        "filled_placement",
        "device_total_bytes",
        "device_free_bytes",
        "memory_budget_bytes",
        "memory_used_bytes",
        "memory_peak_bytes",
        "replica_bytes",
    )
    values = {name: _number(getattr(report, name)) for name in gauges}
    if report.group is not None:
        values["last_plan_time_s"] = _number(report.group.last_plan_time_s)
    check_counters(values, {})


def _number(value: float | tuple[float, ...]) -> npt.NDArray[np.float64]:
    # Floats, because msgpack's integers go beyond int64.
    return np.array(value, dtype=np.float64)


def _worst(values: npt.NDArray[Any]) -> float:
    flat = values.ravel()
    bad = flat[~np.isfinite(flat) | (flat < 0) | (flat > LARGEST_COUNT)]
    return bad[0] if bad.size else float("nan")
