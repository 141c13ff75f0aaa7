"""Which reports are believed: pure checks of one report against what its engine said before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from operator import attrgetter
from typing import Any

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

LARGEST_COUNT = 1 << 62
LONGEST_NAME = 200
LONGEST_TEXT = 10_000
MOST_REPORT_BYTES = 64 << 20
MOST_ERROR_KINDS = 64
LARGEST_REVISION = 1 << 53  # whole in JSON and JavaScript
MOST_REVISIONS_AHEAD = 1_000_000  # of all that the scheduler or another engine knows
_LARGEST = {"ep_size": 1 << 14, "tp_size": 1 << 14, "dp_size": 1 << 14, "num_experts": 1 << 16, "top_k": 1 << 16}
_LARGEST_NUM_LAYERS = 10_000
MOST_CELLS = 1 << 20  # layers x experts, and layers x ranks: DeepSeek V3 has 58 x 256
_SIZES = ("slots_per_rank", "bytes_per_slot", "replica_slots_per_rank", "ranks_per_node", "max_model_len")


@dataclass(frozen=True, slots=True)
class Counters:
    """Every cumulative count of a report: single numbers in a fixed order, which is what makes many reports cheap."""

    numbers: tuple[float, ...]  # in the order of number_names
    errors: Mapping[str, int]
    arrays: dict[str, npt.NDArray[Any]]  # of rank 0


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
    REVISION = "revision"  # a revision far above all that are known


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
    for key in _SIZES:
        if not 0 <= getattr(info, key) <= LARGEST_COUNT:
            raise Refused(Refusal.ENGINE, f"{key}={getattr(info, key)} is not between 0 and 2^62")
    slots = info.ep_size * (info.slots_per_rank + info.replica_slots_per_rank)
    if slots * max(info.bytes_per_slot, 1) > LARGEST_COUNT:
        raise Refused(Refusal.ENGINE, f"{slots} slots of {info.bytes_per_slot} bytes are above 2^62 bytes")
    num_layers = len(info.layer_numbers)
    if not 1 <= num_layers <= _LARGEST_NUM_LAYERS:
        raise Refused(Refusal.ENGINE, f"{num_layers} MoE layers is not between 1 and {_LARGEST_NUM_LAYERS}")
    if num_layers * max(info.num_experts, info.ep_size) > MOST_CELLS:
        raise Refused(
            Refusal.ENGINE,
            f"{num_layers} MoE layers of {info.num_experts} experts on {info.ep_size} ranks are above {MOST_CELLS} "
            "counts of each kind",
        )
    return parse_settings(info.settings)


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Raises Refused."""
    try:
        return Settings.parse(values)
    except SettingsError as error:
        raise Refused(Refusal.SETTINGS, error.message) from None


def counters(report: Report) -> Counters:
    """Every cumulative number of a report, each of the shape the engine's info asks for. Raises Refused."""
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
    if len(report.errors) > MOST_ERROR_KINDS:
        raise Refused(Refusal.SHAPE, f"errors has {len(report.errors)} keys, above {MOST_ERROR_KINDS}")
    _check_keys("steps", report.steps, STEP_PHASES)
    _check_keys("layer_seconds", report.layer_seconds, STEP_PHASES)
    _check_keys("worth", report.worth, STEP_PHASES)
    _check_keys("phase_seconds", report.phase_seconds, STEP_PHASES)
    for phase, seconds in report.phase_seconds.items():
        _check_keys(f"phase_seconds.{phase}", seconds, LAYER_PHASES)
    _check_within(_GAUGES, _gauges(report))
    numbers: list[float] = [report.step, report.held_revision, report.live_revision]
    numbers += [report.steps.get(phase, 0) for phase in STEP_PHASES]
    numbers += [report.layer_seconds.get(phase, 0.0) for phase in STEP_PHASES]
    for phase in STEP_PHASES:
        numbers += _worth_fields(report.worth.get(phase, _NO_WORTH))
    for step in STEP_PHASES:
        seconds = report.phase_seconds.get(step, {})
        for phase in LAYER_PHASES:
            numbers += _buckets(f"phase_seconds.{step}.{phase}", seconds.get(phase, _NO_SECONDS), SECONDS_BUCKETS)
    arrays: dict[str, npt.NDArray[Any]] = {}
    if report.group is not None:
        numbers += _group_numbers(report.group)
        arrays = _group_arrays(report.group, info)
        _check_plans(report.group.plans, info)
    return Counters(tuple(numbers), report.errors, arrays)


@lru_cache
def number_names(has_group: bool) -> tuple[str, ...]:
    """What each of Counters.numbers is."""
    names = ["step", "held_revision", "live_revision"]
    names += [f"{name}.{phase}" for name in ("steps", "layer_seconds") for phase in STEP_PHASES]
    names += [f"worth.{phase}.{name}" for phase in STEP_PHASES for name in Worth.__struct_fields__]
    times = range(len(SECONDS_BUCKETS) + 2)
    names += [f"phase_seconds.{step}.{phase}" for step in STEP_PHASES for phase in LAYER_PHASES for _ in times]
    if has_group:
        names += ["bytes_per_lend", *(f"predicted_gain_s.{phase}" for phase in STEP_PHASES)]
        names += [f"decisions.{phase}.{decision}" for phase in STEP_PHASES for decision in Decision]
        names += [f"imbalance.{stage}" for stage in STAGES for _ in range(len(IMBALANCE_BUCKETS) + 2)]
    return tuple(names)


def check_revisions(report: Report, told: int, stored: int) -> None:
    """Raises Refused for a revision far above what any engine has told and what is stored: it would be adopted, and no
    engine could follow.
    """
    highest = max(min(max(told, stored) + MOST_REVISIONS_AHEAD, LARGEST_REVISION), stored)
    for name in ("held_revision", "live_revision", "live_placement"):
        if getattr(report, name) > highest:
            raise Refused(Refusal.REVISION, f"{name} is {getattr(report, name)}: no more than {highest} is believed")


def check_counters(new: Counters, before: Counters | None) -> None:
    """Raises Refused unless every number is finite, within reason and not less than it was."""
    names = number_names(bool(new.arrays))
    _check_within(names, new.numbers)
    _check_within(new.errors, new.errors.values())
    for name, array in new.arrays.items():
        # NaN fails both comparisons.
        if array.size and not (array.min() >= 0 and array.max() <= LARGEST_COUNT):
            raise Refused(Refusal.COUNT, f"{name} holds {_worst(array)}, not between 0 and 2^62")
    if before is None:
        return
    for name, value, was in zip(names, new.numbers, before.numbers, strict=True):
        if value < was:
            raise _fell(name)
    for name, count in before.errors.items():
        if new.errors.get(name, 0) < count:
            raise _fell(f"errors.{name}")
    for name, array in new.arrays.items():
        if (array < before.arrays[name]).any():
            raise _fell(name)


def check_sums(found: Counters, top_k: int) -> None:
    """Raises Refused unless, in every phase and layer, routed and computed pairs are equal, namely tokens x top-k."""
    pairs_PL = found.arrays["tokens_PL"] * top_k
    for name in ("routed_PLE", "routed_PLR", "computed_PLR"):
        sums_PL = found.arrays[name].sum(axis=2)
        if not np.array_equal(sums_PL, pairs_PL):
            phase, layer = (int(index) for index in np.argwhere(sums_PL != pairs_PL)[0])
            raise Refused(
                Refusal.SUMS,
                f"{name} sums to {sums_PL[phase, layer]} in {STEP_PHASES[phase]}, layer place {layer}, "
                f"tokens x top-k is {pairs_PL[phase, layer]}",
            )


def _group_numbers(group: GroupLoads) -> list[float]:
    _check_keys("decisions", group.decisions, STEP_PHASES)
    _check_keys("predicted_gain_s", group.predicted_gain_s, STEP_PHASES)
    numbers: list[float] = [group.bytes_per_lend]
    numbers += [group.predicted_gain_s.get(phase, 0.0) for phase in STEP_PHASES]
    for phase in STEP_PHASES:
        decisions = group.decisions.get(phase, {})
        _check_keys(f"decisions.{phase}", decisions, _DECISIONS)
        numbers += [decisions.get(decision, 0) for decision in _DECISIONS]
    for stage, histogram in zip(STAGES, group.imbalance_histograms, strict=True):
        numbers += _buckets(f"imbalance.{stage}", histogram, IMBALANCE_BUCKETS)
    return numbers


def _group_arrays(group: GroupLoads, info: EngineInfo) -> dict[str, npt.NDArray[Any]]:
    P, L, R, E = len(STEP_PHASES), len(info.layer_numbers), info.ep_size, info.num_experts
    S, K = len(STAGES), len(LINKS)
    home_rank_LE = _array("home_rank_LE", group.home_rank_LE, "<i2", (L, E))
    if not 0 <= home_rank_LE.min() <= home_rank_LE.max() < R:
        raise Refused(Refusal.COUNT, f"home_rank_LE holds a rank that is not between 0 and {R - 1}")
    int64, float64 = "<i8", "<f8"
    return {
        "tokens_PL": _array("tokens_PL", group.tokens_PL, int64, (P, L)),
        "routed_PLE": _array("routed_PLE", group.routed_PLE, int64, (P, L, E)),
        "routed_PLR": _array("routed_PLR", group.routed_PLR, int64, (P, L, R)),
        "computed_PLR": _array("computed_PLR", group.computed_PLR, int64, (P, L, R)),
        "layer_steps_PL": _array("layer_steps_PL", group.layer_steps_PL, int64, (P, L)),
        "imbalance_sum_PLS": _array("imbalance_sum_PLS", group.imbalance_sum_PLS, float64, (P, L, S)),
        "balancedness_sum_PLS": _array("balancedness_sum_PLS", group.balancedness_sum_PLS, float64, (P, L, S)),
        "spilled_in_PR": _array("spilled_in_PR", group.spilled_in_PR, int64, (P, R)),
        "spilled_out_PR": _array("spilled_out_PR", group.spilled_out_PR, int64, (P, R)),
        "lends_PL": _array("lends_PL", group.lends_PL, int64, (P, L)),
        "lends_in_PRK": _array("lends_in_PRK", group.lends_in_PRK, int64, (P, R, K)),
        "lends_out_PRK": _array("lends_out_PRK", group.lends_out_PRK, int64, (P, R, K)),
    }


def _check_plans(plans: tuple[PlanSample, ...], info: EngineInfo) -> None:
    ids = [plan.id for plan in plans]
    if len(plans) > MOST_PLANS or ids != sorted(set(ids)):
        raise Refused(Refusal.SHAPE, f"plans has {len(plans)} samples, above {MOST_PLANS} or not by growing id")
    limits = (info.num_experts, info.ep_size, info.ep_size, LARGEST_COUNT)
    for plan in plans:
        is_known = plan.decision in _DECISIONS and plan.phase in STEP_PHASES
        is_fitting = len(plan.routed_R) == len(plan.computed_R) == info.ep_size
        if not (is_known and is_fitting and 0 <= plan.layer < len(info.layer_numbers)):
            raise Refused(Refusal.SHAPE, f"plan {plan.id} has a decision, a phase, ranks or a layer that don't fit")
        if any(not 0 <= v < limit for lend in plan.lends for v, limit in zip(lend, limits, strict=True)):
            raise Refused(Refusal.COUNT, f"plan {plan.id} lends an expert or to a rank that is not there")
        numbers = (plan.id, plan.step, plan.time_s, plan.tokens, plan.layer_seconds, abs(plan.predicted_gain_s))
        _check_within(repeat(f"plan {plan.id}"), chain(numbers, plan.routed_R, plan.computed_R))


def _array(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    num_bytes = prod(shape, start=2 if dtype == "<i2" else 8)
    if array.dtype != dtype or array.shape != shape or len(array.data) != num_bytes:
        raise Refused(
            Refusal.SHAPE,
            f"{name} is {array.dtype} {list(array.shape)} of {len(array.data)} bytes, not {dtype} {list(shape)}",
        )
    return array.numpy()


def _check_keys(name: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in values:
        if key not in keys:
            raise Refused(Refusal.SHAPE, f"{name} has the key {key!r}, not one of {', '.join(keys)}")


def _buckets(name: str, histogram: Histogram, bounds: tuple[float, ...]) -> Iterator[float]:
    if len(histogram.counts) != len(bounds) + 1:
        raise Refused(Refusal.SHAPE, f"{name} has {len(histogram.counts)} buckets, not {len(bounds) + 1}")
    return chain(histogram.counts, (histogram.sum,))


def _check_within(names: Iterable[str], values: Iterable[float]) -> None:
    """Raises Refused for what is not a number between 0 and LARGEST_COUNT; msgpack's integers go beyond int64."""
    for name, value in zip(names, values, strict=False):
        if not 0 <= value <= LARGEST_COUNT:
            raise Refused(Refusal.COUNT, f"{name} holds {value}, not between 0 and 2^62")


def _fell(name: str) -> Refused:
    return Refused(Refusal.COUNT, f"{name} is less than it was: counts are cumulative since the engine started")


def _gauges(report: Report) -> Iterator[float]:
    """What may fall again, but not below nothing."""
    group = report.group
    return chain(_gauges_of(report), (group.last_plan_time_s if group is not None else 0.0,))


def _worst(values: npt.NDArray[Any]) -> float:
    flat = values.ravel()
    bad = flat[~np.isfinite(flat) | (flat < 0) | (flat > LARGEST_COUNT)]
    return float(bad[0]) if bad.size else float("nan")


_DECISIONS = tuple(map(str, Decision))
_NO_WORTH, _NO_SECONDS = Worth(), Histogram((0,) * (len(SECONDS_BUCKETS) + 1), 0.0)
_worth_fields = attrgetter(*Worth.__struct_fields__)
_GAUGES = (
    *("time_s", "counting_s", "live_since_step", "live_since_time_s", "live_placement", "filled_placement"),
    *("device_total_bytes", "device_free_bytes", "memory_budget_bytes", "memory_used_bytes", "memory_peak_bytes"),
    *("replica_bytes", "last_plan_time_s"),
)
_gauges_of = attrgetter(*_GAUGES[:-1])
