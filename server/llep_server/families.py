"""Every metric family that /metrics can show: its name, its words, and how to read it off an engine's reports."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)

from llep.config import Mode
from llep.messages import (
    IMBALANCE_BUCKETS,
    LINKS,
    SECONDS_BUCKETS,
    STAGES,
    STEP_PHASES,
    GroupLoads,
    RankSnapshot,
    sum_by_phase,
)
from llep.plan import Decision
from llep.views import EngineState
from llep_server.samples import Bucketed, Family, Level, Observed, Sample, ScrapedEngine

# Plain strings: to go through an enumeration, or to make text of its members, takes longer.
MODES, STATES, DECISIONS = (tuple(map(str, names)) for names in (Mode, EngineState, Decision))


def _group(read: Callable[[GroupLoads], Iterable[Sample]]) -> Callable[[ScrapedEngine], Iterable[Sample]]:
    return lambda engine: read(engine.group) if engine.group else ()


@lru_cache(maxsize=65536)
def _labels(*values: object) -> tuple[str, ...]:
    """The same object for the same values: a page has thousands, and from page to page only the numbers change."""
    return tuple(map(str, values))


@lru_cache(maxsize=256)
def _all_labels(*choices: Iterable[object]) -> tuple[tuple[str, ...], ...]:
    """Labels of every combination; the last one varies fastest."""
    return tuple(itertools.starmap(_labels, itertools.product(*choices)))


def _by_place(values: Iterable[float]) -> Iterable[Sample]:
    return zip(map(_labels, itertools.count()), values, strict=False)


def _in_and_out(group: GroupLoads) -> Iterable[Sample]:
    for direction, spilled_PR in (("in", group.spilled_in_PR), ("out", group.spilled_out_PR)):
        tokens = spilled_PR.numpy().sum(axis=0).tolist()
        yield from zip(_all_labels(range(len(tokens)), (direction,)), tokens, strict=True)


def _lends(factor: Callable[[GroupLoads], int]) -> Callable[[ScrapedEngine], Iterable[Sample]]:
    """Lends times factor, by rank, direction and those links that the engine has."""

    def read(engine: ScrapedEngine) -> Iterable[Sample]:
        if engine.group is None:
            return
        links = LINKS if 0 < engine.info.ranks_per_node < engine.info.ep_size else LINKS[:1]
        each = factor(engine.group)
        for direction, lends_PRK in (("in", engine.group.lends_in_PRK), ("out", engine.group.lends_out_PRK)):
            lends = (lends_PRK.numpy().sum(axis=0)[:, : len(links)] * each).ravel().tolist()
            yield from zip(_all_labels(range(engine.info.ep_size), (direction,), links), lends, strict=True)

    return read


def _info(engine: ScrapedEngine) -> Iterable[Sample]:
    info = engine.info
    planner = str(engine.setting("planner"))
    yield _labels(info.llep_version, info.vllm_version, planner, info.quantization, info.ep_size), 1


def _one_of(names: tuple[str, ...], holds: str) -> Iterable[Sample]:
    return ((_labels(name), int(name == holds)) for name in names)


def _start_time(engine: ScrapedEngine) -> Iterable[Sample]:
    # Two clocks made it: whole seconds, so that it stands still while the engine runs.
    yield (), round(engine.speaker.time_s - engine.speaker.counting_s)


def _held_revision(engine: ScrapedEngine) -> Iterable[Sample]:
    yield (), min(report.held_revision for report in engine.ranks)


def _setting(key: str) -> Callable[[ScrapedEngine], Iterable[Sample]]:
    return lambda engine: [((), float(engine.setting(key)))] if engine.setting(key) is not None else []


def _last_apply_successful(engine: ScrapedEngine) -> Iterable[Sample]:
    yield (), int(not any(report.last_apply_error for report in engine.ranks))


def _last_plan(group: GroupLoads) -> Iterable[Sample]:
    return [((), group.last_plan_time_s)] if group.last_plan_time_s else []


def _decisions(group: GroupLoads) -> Iterable[Sample]:
    decisions = group.decisions_in_both
    return ((_labels(decision), decisions[decision]) for decision in DECISIONS)


def _imbalance(group: GroupLoads) -> Iterable[Sample]:
    pairs = zip(STAGES, group.imbalance_histograms, strict=True)
    return ((_labels(stage), Bucketed(histogram, IMBALANCE_BUCKETS)) for stage, histogram in pairs)


def _balancedness(group: GroupLoads) -> Iterable[Sample]:
    steps_P = group.layer_steps_PL.numpy().sum(axis=1)
    sums_PS = group.balancedness_sum_PLS.numpy().sum(axis=1)
    for place, phase in enumerate(STEP_PHASES):
        for stage, name in enumerate(STAGES):
            yield _labels(name, phase), Observed(int(steps_P[place]), float(sums_PS[place, stage]))


def _worth(unit: str) -> Callable[[ScrapedEngine], Iterable[Sample]]:
    """A counter of Worth's, by phase and side, as rank 0 measured it."""
    sides = [(side, operator.attrgetter(f"{side}_{unit}")) for side in ("lent", "probed")]

    def read(engine: ScrapedEngine) -> Iterable[Sample]:
        for phase, worth in engine.speaker.worth.items():
            yield from ((_labels(phase, side), read_side(worth)) for side, read_side in sides)

    return read


def _measured_gain(engine: ScrapedEngine) -> Iterable[Sample]:
    gains = ((phase, worth.gain_s) for phase, worth in engine.speaker.worth.items())
    return ((_labels(phase), gain_s) for phase, gain_s in gains if gain_s is not None)


def _device_free(engine: ScrapedEngine) -> Iterable[Sample]:
    known = (report for report in engine.ranks if report.device_total_bytes)
    return ((_labels(report.rank), report.device_free_bytes / report.device_total_bytes) for report in known)


def _phase_seconds(engine: ScrapedEngine) -> Iterable[Sample]:
    for phase, histogram in sum_by_phase(report.phase_seconds for report in engine.ranks).items():
        yield _labels(phase), Bucketed(histogram, SECONDS_BUCKETS)


def _each_rank(read: Callable[[RankSnapshot], float]) -> Callable[[ScrapedEngine], Iterable[Sample]]:
    return lambda engine: ((_labels(report.rank), read(report)) for report in engine.ranks)


def _errors(engine: ScrapedEngine) -> Iterable[Sample]:
    totals: dict[tuple[str, ...], int] = {}
    for report in engine.ranks:
        for name, count in report.errors.items():
            component, _, kind = name.partition("/")
            totals[component, kind] = totals.get((component, kind), 0) + count
    return [*totals.items(), *refusals(engine.snapshot.refused)]


def refusals(refused: Mapping[str, int]) -> Iterable[Sample]:
    """Samples of llep_errors_total, of reports that the scheduler refused by reason."""
    return ((("scheduler", f"report_{reason}"), count) for reason, count in refused.items())


def _layer_imbalance(engine: ScrapedEngine) -> Iterable[Sample]:
    if engine.group is None:
        return
    steps, sums = (a.numpy().sum(axis=0) for a in (engine.group.layer_steps_PL, engine.group.imbalance_sum_PLS))
    for index, layer in enumerate(engine.info.layer_numbers):
        for stage, name in enumerate(STAGES):
            yield _labels(layer, name), Observed(int(steps[index]), float(sums[index, stage]))


def _layer_rank_computed(engine: ScrapedEngine) -> Iterable[Sample]:
    if engine.group is None:
        return
    for layer, by_rank in zip(engine.info.layer_numbers, engine.group.computed_PLR.numpy().sum(axis=0), strict=True):
        yield from ((_labels(layer, rank), int(tokens)) for rank, tokens in enumerate(by_rank))


FAMILIES: tuple[Family, ...] = (
    Family(
        "llep_info",
        GaugeMetricFamily,
        "1, with what the engine is as labels.",
        ("version", "vllm_version", "planner", "quantization", "ep_size"),
        Level.ALWAYS,
        _info,
    ),
    Family(
        "llep_engine_last_seen_timestamp_seconds",
        GaugeMetricFamily,
        "Unix time of the newest report of any rank.",
        (),
        Level.ALWAYS,
        lambda engine: [((), engine.snapshot.last_seen_s)],
    ),
    Family(
        "llep_engine_start_timestamp_seconds",
        GaugeMetricFamily,
        "Unix time since which the engine counts: where it changes, counters have begun anew.",
        (),
        Level.ALWAYS,
        _start_time,
    ),
    Family(
        "llep_engine_state",
        GaugeMetricFamily,
        "1 for the state that the engine is in, 0 for the others; live: every rank reports.",
        ("state",),
        Level.ALWAYS,
        lambda engine: _one_of(STATES, engine.snapshot.state),
    ),
    Family(
        "llep_metrics_levels_dropped",
        GaugeMetricFamily,
        "Levels of detail left out because metrics_max_series would be exceeded.",
        (),
        Level.ALWAYS,
        lambda engine: [((), engine.levels_dropped)],
    ),
    Family(
        "llep_mode",
        GaugeMetricFamily,
        "1 for the mode that is live, 0 for the others.",
        ("mode",),
        Level.RANK,
        lambda engine: _one_of(MODES, engine.setting("mode")),
    ),
    Family(
        "llep_settings_revision",
        GaugeMetricFamily,
        "The settings revision that every step runs under now; 0 is as started.",
        (),
        Level.RANK,
        lambda engine: [((), engine.speaker.live_revision)],
    ),
    Family(
        "llep_settings_held_revision",
        GaugeMetricFamily,
        "The newest settings revision that every rank has received; it goes live with the next step.",
        (),
        Level.RANK,
        _held_revision,
    ),
    Family(
        "llep_settings_desired_revision",
        GaugeMetricFamily,
        "The settings revision that the engine should run.",
        (),
        Level.RANK,
        lambda engine: [((), engine.snapshot.desired_revision)],
    ),
    Family(
        "llep_settings_last_apply_successful",
        GaugeMetricFamily,
        "1 unless a rank refused the newest settings.",
        (),
        Level.RANK,
        _last_apply_successful,
    ),
    Family(
        "llep_settings_last_apply_timestamp_seconds",
        GaugeMetricFamily,
        "Unix time since which the live settings revision is live.",
        (),
        Level.RANK,
        lambda engine: [((), engine.speaker.live_since_time_s)],
    ),
    Family(
        "llep_settings_imbalance_threshold",
        GaugeMetricFamily,
        "The live setting imbalance_threshold: max / mean of rank loads from which a layer is balanced.",
        (),
        Level.RANK,
        _setting("imbalance_threshold"),
    ),
    Family(
        "llep_settings_capacity_factor",
        GaugeMetricFamily,
        "The live setting capacity_factor: rank capacity / mean rank load.",
        (),
        Level.RANK,
        _setting("capacity_factor"),
    ),
    Family(
        "llep_settings_min_chunk_tokens",
        GaugeMetricFamily,
        "The live setting min_chunk_tokens: fewest pairs worth lending an expert for.",
        (),
        Level.RANK,
        _setting("min_chunk_tokens"),
    ),
    Family(
        "llep_steps_total",
        CounterMetricFamily,
        "Forward passes with at least one real token, by phase.",
        ("phase",),
        Level.RANK,
        lambda engine: ((_labels(phase), steps) for phase, steps in engine.speaker.steps.items()),
    ),
    Family(
        "llep_tokens_total",
        CounterMetricFamily,
        "Real tokens that went through the model, without padding and dummy steps.",
        (),
        Level.RANK,
        _group(lambda group: [((), int(group.tokens_PL.numpy().sum(axis=0).max()))]),
    ),
    Family(
        "llep_last_plan_timestamp_seconds",
        GaugeMetricFamily,
        "Unix time of the last decision, also of one to move nothing; absent before the first.",
        (),
        Level.RANK,
        _group(_last_plan),
    ),
    Family(
        "llep_plan_decisions_total",
        CounterMetricFamily,
        "Decisions, one per layer and step, by reason.",
        ("decision",),
        Level.RANK,
        _group(_decisions),
    ),
    Family(
        "llep_rank_routed_tokens_total",
        CounterMetricFamily,
        "Token-expert pairs that plain EP would have computed on the rank, over all layers.",
        ("ep_rank",),
        Level.RANK,
        _group(lambda group: _by_place(group.routed_PLR.numpy().sum(axis=(0, 1)).tolist())),
    ),
    Family(
        "llep_rank_computed_tokens_total",
        CounterMetricFamily,
        "Token-expert pairs computed on the rank, over all layers.",
        ("ep_rank",),
        Level.RANK,
        _group(lambda group: _by_place(group.computed_PLR.numpy().sum(axis=(0, 1)).tolist())),
    ),
    Family(
        "llep_imbalance_ratio",
        HistogramMetricFamily,
        "Max / mean of rank loads, one observation per layer and step, before and after balancing.",
        ("stage",),
        Level.RANK,
        _group(_imbalance),
    ),
    Family(
        "llep_balancedness_ratio",
        SummaryMetricFamily,
        "Mean / max of rank loads, one observation per layer and step, before and after balancing.",
        ("stage", "phase"),
        Level.RANK,
        _group(_balancedness),
    ),
    Family(
        "llep_spilled_tokens_total",
        CounterMetricFamily,
        "Token-expert pairs computed off their home rank: in, for others; out, elsewhere.",
        ("ep_rank", "direction"),
        Level.RANK,
        _group(_in_and_out),
    ),
    Family(
        "llep_lends_total",
        CounterMetricFamily,
        "Expert weights copied for one layer of one step: in, received; out, sent; within a node or over the network.",
        ("ep_rank", "direction", "link"),
        Level.RANK,
        _lends(lambda group: 1),
    ),
    Family(
        "llep_lend_bytes_total",
        CounterMetricFamily,
        "Bytes of expert weights copied: in, received; out, sent; within a node or over the network.",
        ("ep_rank", "direction", "link"),
        Level.RANK,
        _lends(lambda group: group.bytes_per_lend),
    ),
    Family(
        "llep_phase_seconds",
        HistogramMetricFamily,
        "Time in each phase of a MoE layer, one observation per rank, layer and step.",
        ("phase",),
        Level.RANK,
        _phase_seconds,
    ),
    Family(
        "llep_layer_seconds_total",
        CounterMetricFamily,
        "Wall time that the rank spent inside MoE layers, waiting for other ranks included.",
        ("ep_rank",),
        Level.RANK,
        _each_rank(lambda report: sum(report.layer_seconds.values())),
    ),
    Family(
        "llep_predicted_gain_seconds_total",
        CounterMetricFamily,
        "Time in MoE layers that plans were predicted to save; 0 without a cost model.",
        (),
        Level.RANK,
        _group(lambda group: [((), sum(group.predicted_gain_s.values()))]),
    ),
    Family(
        "llep_measured_gain_seconds",
        GaugeMetricFamily,
        "Time in MoE layers that lending has saved since start, measured by probes; below 0 it cost time.",
        ("phase",),
        Level.RANK,
        _measured_gain,
    ),
    Family(
        "llep_worth_seconds_total",
        CounterMetricFamily,
        "Wall time of rank 0 in layers that lent, or would have and were computed by plain EP to compare: probed.",
        ("phase", "side"),
        Level.RANK,
        _worth("s"),
    ),
    Family(
        "llep_worth_pairs_total",
        CounterMetricFamily,
        "Token-expert pairs of the most loaded rank under plain EP, in the layers of llep_worth_seconds_total.",
        ("phase", "side"),
        Level.RANK,
        _worth("pairs"),
    ),
    Family(
        "llep_worth_steps_total",
        CounterMetricFamily,
        "Steps with a layer that lent, or would have and was computed by plain EP.",
        ("phase", "side"),
        Level.RANK,
        _worth("steps"),
    ),
    Family(
        "llep_memory_budget_bytes",
        GaugeMetricFamily,
        "Bytes reserved for llep on the rank at start.",
        ("ep_rank",),
        Level.RANK,
        _each_rank(operator.attrgetter("memory_budget_bytes")),
    ),
    Family(
        "llep_memory_used_bytes",
        GaugeMetricFamily,
        "Bytes of workspace, and of slots in use in the last step that lent.",
        ("ep_rank",),
        Level.RANK,
        _each_rank(operator.attrgetter("memory_used_bytes")),
    ),
    Family(
        "llep_memory_peak_bytes",
        GaugeMetricFamily,
        "Bytes of workspace, and most of slots in use in any step since start.",
        ("ep_rank",),
        Level.RANK,
        _each_rank(operator.attrgetter("memory_peak_bytes")),
    ),
    Family(
        "llep_memory_replica_bytes",
        GaugeMetricFamily,
        "Bytes of each rank's budget that are reserved for resident replicas.",
        (),
        Level.RANK,
        lambda engine: [((), engine.speaker.replica_bytes)],
    ),
    Family(
        "llep_device_free_ratio",
        GaugeMetricFamily,
        "Free / total memory of the rank's device, or of its part of the host's.",
        ("ep_rank",),
        Level.RANK,
        _device_free,
    ),
    Family(
        "llep_placement_revision",
        GaugeMetricFamily,
        "The revision in which the resident replicas that are switched on were ordered; 0: none.",
        (),
        Level.RANK,
        lambda engine: [((), engine.speaker.live_placement)],
    ),
    Family(
        "llep_placement_filled_copies",
        GaugeMetricFamily,
        "Resident replicas whose weights are in place, of the placement under way.",
        (),
        Level.RANK,
        lambda engine: [((), engine.speaker.filled_placement)],
    ),
    Family(
        "llep_hot_expert_load_ratio",
        GaugeMetricFamily,
        "Load / fair load of the hottest experts over all layers in the last minute, by place.",
        ("place",),
        Level.RANK,
        lambda engine: _by_place(engine.snapshot.hot_ratios),
    ),
    Family(
        "llep_errors_total",
        CounterMetricFamily,
        "Errors on the way, by component and type; model_name is empty for reports of an engine that isn't known.",
        ("component", "type"),
        Level.RANK,
        _errors,
    ),
    Family(
        "llep_layer_imbalance_ratio",
        SummaryMetricFamily,
        "Max / mean of rank loads in each layer, one observation per step, before and after balancing.",
        ("layer", "stage"),
        Level.LAYER,
        _layer_imbalance,
    ),
    Family(
        "llep_layer_rank_computed_tokens_total",
        CounterMetricFamily,
        "Token-expert pairs of the layer computed on the rank.",
        ("layer", "ep_rank"),
        Level.LAYER_RANK,
        _layer_rank_computed,
    ),
)
SCHEDULER_FAMILIES = {
    "llep_scheduler_up": "1 if the scheduler answered this scrape; 0 if not, then engines are missing here.",
    "llep_scheduler_store_open": "1 if the scheduler can store settings and events; 0 if not, and changes are refused.",
}  # gauges without labels
