"""What the scheduler knows of its engines: the newest report of each rank, and loads over the last minutes.

Pure: the caller passes its clock in, a monotonic one, so that a wall clock that jumps does no harm. Memory is bounded.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.messages import STEP_PHASES, EngineInfo, PlanSample, Report, is_one_engine
from llep.scheduler.admit import (
    Counters,
    Refusal,
    Refused,
    check_counters,
    check_revisions,
    check_sums,
    counters,
    parse_settings,
    start_settings,
)
from llep.scheduler.totals import GAUGES, PER_RANK, Totals, per_rank
from llep.views import EngineState, EventKind

SHORTEST_SILENCE_S = 5.0
SILENT_INTERVALS = 5
FORGET_AFTER_S = 86400.0
RECENT_S = 180.0
MOST_PLANS = 200  # sampled plans that are kept of an engine
HOT_RATIO = 1.5  # share / fair share from which an expert is hot
MOST_ENGINES = 4096
MOST_WINDOW_BYTES = 4 << 30  # of all engines, their rings full: those of 370 engines of DeepSeek V3's size
REPLACED_REMEMBERED = 16
ERROR_EVENT_EVERY_S = 60.0  # of each kind of error of an engine
MOST_DISPUTED = 5  # reports of a rank that are refused in a row for being less than what it said before


@dataclass(frozen=True, slots=True)
class Change:
    """Something about an engine that people want to know."""

    kind: EventKind
    engine: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """A sampled plan under an id that grows over all engines, also when the scheduler starts anew."""

    id: int
    sample: PlanSample


DISPUTES = (Refusal.ORDER, Refusal.COUNT)  # a report against what its rank said before
_plan_ids = itertools.count(time.time_ns() // 1_000_000)


@dataclass(slots=True)
class Engine:
    """One engine under one name. `reports` is empty as long as only the store remembers it."""

    info: EngineInfo
    incarnation: str
    start: Settings
    state: EngineState
    since_s: float
    reports: dict[int, Report] = field(default_factory=dict)
    live: dict[int, Settings] = field(default_factory=dict)
    seen_s: dict[int, float] = field(default_factory=dict)
    counted: dict[int, Counters] = field(default_factory=dict)
    replaced: deque[str] = field(default_factory=lambda: deque(maxlen=REPLACED_REMEMBERED))
    refused: Counter[str] = field(default_factory=Counter)
    is_compared: bool = False  # what it runs, with what the store says of a revision of that number
    lost: int = 0  # reports, by the gaps in their numbers
    doubled: int = 0
    told_errors: dict[str, tuple[int, float]] = field(default_factory=dict)  # kind -> how many, when it was an event
    disputed: Counter[int] = field(default_factory=Counter)  # reports of each rank, refused in a row
    settled_s: float = 0.0  # since when it runs the settings that are live; placements come and go under them
    placed_s: float = 0.0  # since when it runs the placement that is live
    plans: deque[KeptPlan] = field(default_factory=lambda: deque(maxlen=MOST_PLANS))
    totals: Totals = field(init=False)
    # What each rank says of its time and memory, and what is added to its cumulative part: see _put_rank.
    per_rank_RX: npt.NDArray[np.float64] = field(init=False)
    base_RX: npt.NDArray[np.float64] = field(init=False)
    # Monotonic seconds, nan where it isn't hot. V: over both phases of steps, then of each.
    hot_since_VLE: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        R = self.info.ep_size
        self.per_rank_RX, self.base_RX = np.zeros((R, PER_RANK + GAUGES)), np.zeros((R, PER_RANK))
        self.begin_windows()

    def begin_windows(self) -> None:
        """Nothing is known yet of what the group counts."""
        L, E, R = len(self.info.layer_numbers), self.info.num_experts, self.info.ep_size
        self.totals = Totals(R, L, E, self.start.decide_every_s)
        self.hot_since_VLE = np.full((1 + len(STEP_PHASES), L, E), np.nan, dtype=np.float32)
        self.plans.clear()

    @property
    def last_seen_s(self) -> float:
        return max(self.seen_s.values(), default=self.since_s)

    @property
    def held_revision(self) -> int:
        """The newest that all ranks have received; 0 until all have reported."""
        return self._least("held_revision")

    @property
    def live_revision(self) -> int:
        return self._least("live_revision")

    @property
    def live_settings(self) -> Settings:
        """Those of the lowest rank that has reported; as started before any has."""
        return self.live[min(self.live)] if self.live else self.start

    @property
    def home_rank_LE(self) -> npt.NDArray[np.int16] | None:
        """None before rank 0 has reported."""
        group = self.reports[0].group if 0 in self.reports else None
        return group.home_rank_LE.numpy() if group is not None else None

    @property
    def live_placement(self) -> int:
        """Number of the placement that is switched on, on all ranks; 0: none."""
        return self._least("live_placement")

    @property
    def filled_placement(self) -> int:
        """Copies in place already, of the placement under way; every rank counts those of all."""
        return self._least("filled_placement")

    @property
    def last_apply_error(self) -> str:
        return next((r.last_apply_error for _, r in sorted(self.reports.items()) if r.last_apply_error), "")

    def silence_limit_s(self, desired_interval_s: float) -> float:
        """Seconds of silence after which a rank counts as gone; the slower of what it runs and what it was told."""
        intervals = [settings.report_interval_s for settings in self.live.values()]
        return max(SHORTEST_SILENCE_S, SILENT_INTERVALS * max(*intervals, desired_interval_s, 0.0))

    def state_at(self, now_s: float, desired_interval_s: float) -> EngineState:
        limit_s = self.silence_limit_s(desired_interval_s)
        if now_s - self.last_seen_s > limit_s or any(now_s - seen_s > limit_s for seen_s in self.seen_s.values()):
            return EngineState.STALE
        return EngineState.LIVE if len(self.reports) == self.info.ep_size else EngineState.STARTING

    def may_tell(self, error: str, now_s: float) -> bool:
        """Whether that kind of error has not been an event just now."""
        return error not in self.told_errors or now_s - self.told_errors[error][1] >= ERROR_EVENT_EVERY_S

    def _least(self, key: str) -> int:
        if len(self.reports) < self.info.ep_size:
            return 0
        return min(int(getattr(report, key)) for report in self.reports.values())


class Windows:
    """All engines by name."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.refused: Counter[str] = Counter()  # reports of no engine that is known
        self._told_revision = 0  # the highest that any engine has received
        self._forgotten_lost = self._forgotten_doubled = 0

    @property
    def lost(self) -> int:
        """Reports that never came, of all engines there have been."""
        return self._forgotten_lost + sum(engine.lost for engine in self.engines.values())

    @property
    def doubled(self) -> int:
        return self._forgotten_doubled + sum(engine.doubled for engine in self.engines.values())

    def count_refusal(self, engine: str | None, reason: Refusal, count: int = 1) -> None:
        known = self.engines.get(engine or "")
        (self.refused if known is None else known.refused)[reason] += count

    def restore(self, info: EngineInfo, incarnation: str, seen_s: float, now_s: float) -> None:
        """Remember an engine from before: starting, if it may well be there still, else stale. Raises Refused."""
        is_recent = now_s - seen_s < RECENT_S
        state = EngineState.STARTING if is_recent else EngineState.STALE
        since_s = now_s if is_recent else seen_s
        engine = Engine(info, incarnation, start_settings(info), state, since_s)
        self._check_room(engine)
        self.engines[info.engine] = engine

    def take(
        self, report: Report, now_s: float, desired_interval_s: float = 0.0, stored_revision: int = 0
    ) -> list[Change]:
        """Believe a report. Raises Refused; then nothing but a count has changed."""
        known = self.engines.get(report.info.engine)
        try:
            check_revisions(report, self._told_revision, stored_revision)
            return self._take(known, report, now_s, desired_interval_s)
        except Refused as refused:
            self.count_refusal(report.info.engine, refused.reason)
            if refused.reason in DISPUTES and known is not None and report.incarnation == known.incarnation:
                known.disputed[report.rank] += 1
            raise

    def tick(self, now_s: float, desired_interval_s: Mapping[str, float]) -> list[Change]:
        """Let time pass: engines become stale, and those stale for a day are forgotten."""
        changes = []
        for name, engine in list(self.engines.items()):
            changes += _new_errors(engine, now_s)
            changes += _follow_state(engine, now_s, desired_interval_s.get(name, 0.0))
            if engine.state is EngineState.STALE and now_s - engine.last_seen_s > FORGET_AFTER_S:
                del self.engines[name]
                self._forgotten_lost += engine.lost
                self._forgotten_doubled += engine.doubled
        return changes

    def _take(self, known: Engine | None, report: Report, now_s: float, desired_interval_s: float) -> list[Change]:
        if known is not None and _is_doubled(known.reports.get(report.rank), report):
            known.doubled += 1
            return []  # an agent that lost its link says it all again
        if known is not None and report.incarnation in known.replaced:
            raise Refused(
                Refusal.REPLACED,
                f"another engine named {known.info.engine!r} has started since; give each engine a name of its own "
                "with LLEP_ENGINE",
            )
        if known is None or report.incarnation != known.incarnation:
            start = start_settings(report.info)
            before, found = None, _check(report, None, None)  # all of it, before memory is taken
            engine = self._new_engine(known, report, start, now_s)
            changes = _restart(known, engine)
        else:
            engine, changes = known, []
            before, found = _check_known(known, report)
        if before is None and report.rank in engine.reports:
            changes.append(_believed_anew(engine, report))
        old_error = engine.last_apply_error
        self.engines[report.info.engine] = engine
        self._told_revision = max(self._told_revision, report.held_revision)
        _put(engine, report, before, found, now_s)
        had = before.errors if before is not None else {}
        if any(count > had.get(kind, 0) and engine.may_tell(kind, now_s) for kind, count in report.errors.items()):
            changes += _new_errors(engine, now_s)
        if engine.last_apply_error and engine.last_apply_error != old_error:
            changes.append(_apply_failed(engine, report))
        return changes + _follow_state(engine, now_s, desired_interval_s)

    def _new_engine(self, known: Engine | None, report: Report, start: Settings, now_s: float) -> Engine:
        engine = Engine(report.info, report.incarnation, start, EngineState.STARTING, now_s)
        self._check_room(engine)
        if known is not None:
            engine.refused, engine.lost, engine.doubled = known.refused, known.lost, known.doubled
            engine.replaced.extend([*known.replaced, known.incarnation])
        return engine

    def _check_room(self, engine: Engine) -> None:
        """Raises Refused where this engine, new or started anew, would be one too many."""
        others = [other for name, other in self.engines.items() if name != engine.info.engine]
        if len(others) >= MOST_ENGINES:
            raise Refused(
                Refusal.ENGINE, f"{MOST_ENGINES} engines are known already; names must not change at each start"
            )
        if sum(other.totals.most_bytes for other in [*others, engine]) > MOST_WINDOW_BYTES:
            raise Refused(
                Refusal.ENGINE,
                f"the windows of all engines would be above {MOST_WINDOW_BYTES} bytes: give some of them a scheduler "
                "of their own (LLEP_RAY_NAMESPACE)",
            )


def _is_doubled(before: Report | None, report: Report) -> bool:
    return before is not None and before.seq == report.seq and before == report


def _check_known(engine: Engine, report: Report) -> tuple[Report | None, Counters]:
    """The report on which this one goes on, and what it counts. Raises Refused."""
    if not is_one_engine(report.info, engine.info):
        raise Refused(Refusal.ENGINE, f"rank {report.rank} describes the engine otherwise than it was described before")
    before = engine.reports.get(report.rank)
    try:
        return before, _check(report, before, engine.counted.get(report.rank))
    except Refused as refused:
        if refused.reason not in DISPUTES or engine.disputed[report.rank] < MOST_DISPUTED:
            raise
    return None, _check(report, None, None)


def _check(report: Report, before: Report | None, counted: Counters | None) -> Counters:
    """What a report counts that goes on where `before` stopped. Raises Refused."""
    if before is not None and report.seq <= before.seq:
        raise Refused(Refusal.ORDER, f"report {report.seq} of rank {report.rank} came after report {before.seq}")
    found = counters(report)
    if before is not None and before.group is not None and report.group is not None:
        if before.group.home_rank_LE != report.group.home_rank_LE:
            raise Refused(Refusal.ENGINE, "home ranks are others than before: they are fixed while an engine runs")
    check_counters(found, counted)
    if report.group is not None:
        check_sums(found, report.info.top_k)
    if before is None or before.live_settings != report.live_settings:
        parse_settings(report.live_settings)
    return found


def _put(engine: Engine, report: Report, before: Report | None, found: Counters, now_s: float) -> None:
    if before is None and report.rank in engine.reports and report.group is not None:
        engine.begin_windows()
    if before is None or before.live_settings != report.live_settings:
        engine.live[report.rank] = parse_settings(report.live_settings)
        engine.settled_s = now_s
    if before is not None:
        engine.lost += report.seq - before.seq - 1
    placement = engine.live_placement
    engine.reports[report.rank] = report
    if engine.live_placement != placement:
        engine.placed_s = now_s
    engine.counted[report.rank] = found
    _put_rank(engine, report, is_first=before is None)
    engine.seen_s[report.rank] = now_s
    engine.disputed.pop(report.rank, None)
    if report.group is not None:
        _put_group(engine, report, found, now_s)


def _put_rank(engine: Engine, report: Report, is_first: bool) -> None:
    """What a rank says of its time and memory.

    A rank that is heard for the first time is taken to have been like the others so far, one that is believed anew to
    have stood still: what it had counted before is no news.
    """
    rank, said_X = report.rank, np.array(per_rank(report))
    if is_first and engine.seen_s:
        known = [rank] if rank in engine.seen_s else list(engine.seen_s)
        engine.base_RX[rank] = engine.per_rank_RX[known, :PER_RANK].mean(axis=0) - said_X[:PER_RANK]
    said_X[:PER_RANK] += engine.base_RX[rank]
    engine.per_rank_RX[rank] = said_X


def _put_group(engine: Engine, report: Report, found: Counters, now_s: float) -> None:
    assert report.group is not None
    totals = engine.totals
    if totals.is_empty and report.counting_s < RECENT_S:  # what was before its first report counts too
        totals.begin(now_s - report.counting_s)
    row = totals.columns.row(report, found, engine.per_rank_RX, list(engine.seen_s))
    if totals.put(now_s, row, found):
        _follow_heat(engine, now_s)
    newest = engine.plans[-1].sample.id if engine.plans else 0
    for sample in report.group.plans:
        if sample.id > newest:
            engine.plans.append(KeptPlan(next(_plan_ids), sample))


def _follow_heat(engine: Engine, now_s: float) -> None:
    """Remember since when each expert has had HOT_RATIO times its fair share, step after step."""
    step_s = engine.totals.expert_step_s
    _, routed_PLE, *_ = engine.totals.experts(step_s)
    routed_VLE = np.concatenate([routed_PLE.sum(axis=0, keepdims=True), routed_PLE])
    pairs_VL1 = routed_VLE.sum(axis=2, keepdims=True)
    is_hot_VLE = routed_VLE * engine.info.num_experts >= HOT_RATIO * pairs_VL1
    before_VLE = engine.hot_since_VLE
    since_VLE = np.where(np.isnan(before_VLE), np.float32(now_s - step_s), before_VLE)
    # A layer without a pair says nothing.
    kept_VLE = np.where(is_hot_VLE, since_VLE, np.float32(np.nan))
    engine.hot_since_VLE = np.where(pairs_VL1 > 0, kept_VLE, before_VLE)


def _follow_state(engine: Engine, now_s: float, desired_interval_s: float) -> list[Change]:
    old, engine.state = engine.state, engine.state_at(now_s, desired_interval_s)
    name, ep_size = engine.info.engine, engine.info.ep_size
    if engine.state is old:
        return []
    if engine.state is EngineState.LIVE:
        data = {"incarnation": engine.incarnation, "ranks": ep_size, "model_name": engine.info.model_name}
        return [Change(EventKind.ENGINE_UP, name, f"engine {name} is live with {ep_size} ranks", data)]
    if engine.state is EngineState.STALE:
        limit_s = engine.silence_limit_s(desired_interval_s)
        silent = [rank for rank in range(ep_size) if now_s - engine.seen_s.get(rank, -np.inf) > limit_s]
        message = f"engine {name} is stale: no report from ranks {', '.join(map(str, silent))}"
        return [Change(EventKind.ENGINE_STALE, name, message, {"incarnation": engine.incarnation, "ranks": silent})]
    return []


def _restart(known: Engine | None, engine: Engine) -> list[Change]:
    if known is None:
        return []
    data = {"incarnation": engine.incarnation, "before": known.incarnation}
    return [
        Change(EventKind.ENGINE_RESTARTED, engine.info.engine, f"engine {engine.info.engine} has started anew", data)
    ]


def _believed_anew(engine: Engine, report: Report) -> Change:
    name = engine.info.engine
    message = (
        f"rank {report.rank} of engine {name} is believed anew: {MOST_DISPUTED} of its reports in a row were refused "
        "for what it had said before"
    )
    return Change(EventKind.REPORT_REFUSED, name, message, {"rank": report.rank, "refused": MOST_DISPUTED})


def _new_errors(engine: Engine, now_s: float) -> list[Change]:
    """One for each kind of error of which there are more than was told, and that was not told just now."""
    by_kind: dict[str, dict[int, int]] = {}
    for rank, report in sorted(engine.reports.items()):
        for kind, count in report.errors.items():
            by_kind.setdefault(kind, {})[rank] = count
    changes, name = [], engine.info.engine
    for kind, by_rank in sorted(by_kind.items()):
        count = sum(by_rank.values())
        told, _ = engine.told_errors.get(kind, (0, 0.0))
        if count > told and engine.may_tell(kind, now_s):
            engine.told_errors[kind] = count, now_s
            ranks = [rank for rank, its in by_rank.items() if its]
            where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            message = f"engine {name}: {kind}, {count} times so far, on {where}; its log says more"
            changes.append(
                Change(EventKind.ENGINE_ERROR, name, message, {"ranks": ranks, "error": kind, "count": count})
            )
    return changes


def _apply_failed(engine: Engine, report: Report) -> Change:
    message = f"engine {engine.info.engine} refused a directive: {engine.last_apply_error}"
    return Change(
        EventKind.APPLY_FAILED,
        engine.info.engine,
        message,
        {"rank": report.rank, "held_revision": report.held_revision},
    )
