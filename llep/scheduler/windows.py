"""What the scheduler knows of its engines: the newest report of each rank, and loads over the last minutes.

Pure: the caller passes its clock in, a monotonic one, so that a wall clock that jumps does no harm. Memory is bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.messages import EngineInfo, Report
from llep.scheduler.admit import (
    Counters,
    Refusal,
    Refused,
    check_counters,
    check_sums,
    counters,
    parse_settings,
    start_settings,
)
from llep.views import EngineLoads, EngineState, EventKind, RankLoads

MOST_SNAPSHOTS = 900  # a quarter of an hour at one per second
SNAPSHOT_SPACING_S = 1.0
SHORTEST_SILENCE_S = 5.0
SILENT_INTERVALS = 5
FORGET_AFTER_S = 86400.0
RECENT_S = 180.0
MOST_ENGINES = 4096
REPLACED_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Change:
    """Something about an engine that people want to know."""

    kind: EventKind
    engine: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine's cumulative loads at one moment, summed over layers. R ranks, S stages."""

    time_s: float
    tokens: int
    layer_steps: int
    imbalance_sum_S: npt.NDArray[np.float64]
    routed_R: npt.NDArray[np.int64]
    computed_R: npt.NDArray[np.int64]
    lends: int
    lend_bytes: int
    spilled_tokens: int
    decisions: Mapping[str, int]
    layer_seconds: float  # mean over ranks


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
    snapshots: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=MOST_SNAPSHOTS))
    replaced: deque[str] = field(default_factory=lambda: deque(maxlen=REPLACED_REMEMBERED))
    refused: Counter[str] = field(default_factory=Counter)

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

    def _least(self, key: str) -> int:
        if len(self.reports) < self.info.ep_size:
            return 0
        return min(int(getattr(report, key)) for report in self.reports.values())


class Windows:
    """All engines by name."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}

    def restore(self, info: EngineInfo, incarnation: str, seen_s: float, now_s: float) -> None:
        """Remember an engine from before: starting, if it may well be there still, else stale. Raises Refused."""
        is_recent = now_s - seen_s < RECENT_S
        state = EngineState.STARTING if is_recent else EngineState.STALE
        since_s = now_s if is_recent else seen_s
        self.engines[info.engine] = Engine(info, incarnation, start_settings(info), state, since_s)

    def take(self, report: Report, now_s: float, desired_interval_s: float = 0.0) -> list[Change]:
        """Believe a report. Raises Refused; then nothing but a count has changed."""
        known = self.engines.get(report.info.engine)
        try:
            return self._take(known, report, now_s, desired_interval_s)
        except Refused as refused:
            if known is not None:
                known.refused[refused.reason] += 1
            raise

    def tick(self, now_s: float, desired_interval_s: Mapping[str, float]) -> list[Change]:
        """Let time pass: engines become stale, and those stale for a day are forgotten."""
        changes = []
        for name, engine in list(self.engines.items()):
            changes += _follow_state(engine, now_s, desired_interval_s.get(name, 0.0))
            if engine.state is EngineState.STALE and now_s - engine.last_seen_s > FORGET_AFTER_S:
                del self.engines[name]
        return changes

    def _take(self, known: Engine | None, report: Report, now_s: float, desired_interval_s: float) -> list[Change]:
        if known is not None and known.reports.get(report.rank) == report:
            return []  # an agent that lost its link says it all again
        if known is not None and report.incarnation in known.replaced:
            raise Refused(
                Refusal.REPLACED,
                f"another engine named {known.info.engine!r} has started since; give each engine a name of its own "
                "with LLEP_ENGINE",
            )
        engine = known
        if known is None or report.incarnation != known.incarnation:
            engine = self._new_engine(known, report, now_s)
        assert engine is not None
        found = _check(engine, report)
        changes = [] if engine is known else [*_restart(known, engine)]
        changes += _new_errors(engine, report)
        old_error = engine.last_apply_error
        self.engines[report.info.engine] = engine
        _put(engine, report, found, now_s)
        if engine.last_apply_error and engine.last_apply_error != old_error:
            changes.append(_apply_failed(engine, report))
        return changes + _follow_state(engine, now_s, desired_interval_s)

    def _new_engine(self, known: Engine | None, report: Report, now_s: float) -> Engine:
        if known is None and len(self.engines) >= MOST_ENGINES:
            raise Refused(
                Refusal.ENGINE, f"{MOST_ENGINES} engines are known already; names must not change at each start"
            )
        engine = Engine(report.info, report.incarnation, start_settings(report.info), EngineState.STARTING, now_s)
        if known is not None:
            engine.refused = known.refused
            engine.replaced.extend([*known.replaced, known.incarnation])
        return engine


def loads(engine: Engine, window_s: float, now_s: float, desired_interval_s: float = 0.0) -> EngineLoads:
    """Loads over the last window_s seconds of reports, or what there is of it; nothing if rank 0 has fallen silent."""
    newest, base = _window(engine, window_s, now_s, desired_interval_s)
    layer_steps = newest.layer_steps - base.layer_steps
    imbalance_S = (newest.imbalance_sum_S - base.imbalance_sum_S) / max(layer_steps, 1)
    return EngineLoads(
        engine=engine.info.engine,
        model_name=engine.info.model_name,
        window_s=newest.time_s - base.time_s,
        tokens=newest.tokens - base.tokens,
        layer_steps=layer_steps,
        imbalance_ratio_before=float(imbalance_S[0]) if layer_steps else None,
        imbalance_ratio_after=float(imbalance_S[1]) if layer_steps else None,
        lends=newest.lends - base.lends,
        lend_bytes=newest.lend_bytes - base.lend_bytes,
        spilled_tokens=newest.spilled_tokens - base.spilled_tokens,
        decisions={key: count - base.decisions.get(key, 0) for key, count in newest.decisions.items()},
        layer_seconds=newest.layer_seconds - base.layer_seconds,
        ranks=[_rank_loads(engine, rank, newest, base) for rank in sorted(engine.reports)],
    )


def _window(engine: Engine, window_s: float, now_s: float, desired_interval_s: float) -> tuple[Snapshot, Snapshot]:
    silent_s = now_s - engine.snapshots[-1].time_s if engine.snapshots else np.inf
    if silent_s > engine.silence_limit_s(desired_interval_s):
        nothing = _nothing(engine, now_s)
        return nothing, nothing
    newest = engine.snapshots[-1]
    older = [s for s in engine.snapshots if s.time_s <= newest.time_s - window_s]
    return newest, older[-1] if older else engine.snapshots[0]


def _nothing(engine: Engine, now_s: float) -> Snapshot:
    zeros_R = np.zeros(engine.info.ep_size, dtype=np.int64)
    return Snapshot(now_s, 0, 0, np.zeros(2), zeros_R, zeros_R, 0, 0, 0, {}, 0.0)


def _rank_loads(engine: Engine, rank: int, newest: Snapshot, base: Snapshot) -> RankLoads:
    report = engine.reports[rank]
    return RankLoads(
        rank=rank,
        routed_tokens=int(newest.routed_R[rank] - base.routed_R[rank]),
        computed_tokens=int(newest.computed_R[rank] - base.computed_R[rank]),
        memory_budget_bytes=report.memory_budget_bytes,
        memory_used_bytes=report.memory_used_bytes,
        memory_peak_bytes=report.memory_peak_bytes,
    )


def _check(engine: Engine, report: Report) -> Counters:
    if report.info != engine.info:
        raise Refused(Refusal.ENGINE, f"rank {report.rank} describes the engine otherwise than it was described before")
    before = engine.reports.get(report.rank)
    if before is not None and report.seq <= before.seq:
        raise Refused(Refusal.ORDER, f"report {report.seq} of rank {report.rank} came after report {before.seq}")
    found = counters(report)
    check_counters(found, engine.counted.get(report.rank, {}))
    if report.group is not None:
        check_sums(found, engine.info.top_k)
    if before is None or before.live_settings != report.live_settings:
        parse_settings(report.live_settings)
    return found


def _put(engine: Engine, report: Report, found: Counters, now_s: float) -> None:
    before = engine.reports.get(report.rank)
    if before is None or before.live_settings != report.live_settings:
        engine.live[report.rank] = parse_settings(report.live_settings)
    engine.reports[report.rank] = report
    engine.counted[report.rank] = found
    engine.seen_s[report.rank] = now_s
    if report.group is not None:
        if not engine.snapshots and report.counting_s < RECENT_S:  # what was before its first report counts too
            engine.snapshots.append(_nothing(engine, now_s - report.counting_s))
        _add_snapshot(engine.snapshots, _snapshot(engine, report, found, now_s))


def _snapshot(engine: Engine, report: Report, found: Counters, now_s: float) -> Snapshot:
    assert report.group is not None
    lends = int(found["lends_in_RK"].sum())
    return Snapshot(
        time_s=now_s,
        tokens=int(found["tokens_PL"].sum(axis=0).max()),
        layer_steps=int(found["layer_steps_PL"].sum()),
        imbalance_sum_S=found["imbalance_sum_PLS"].sum(axis=(0, 1)),
        routed_R=found["routed_PLR"].sum(axis=(0, 1)),
        computed_R=found["computed_PLR"].sum(axis=(0, 1)),
        lends=lends,
        lend_bytes=lends * report.group.bytes_per_lend,
        spilled_tokens=int(found["spilled_in_R"].sum()),
        decisions=report.group.decisions,
        layer_seconds=sum(sum(r.layer_seconds.values()) for r in engine.reports.values()) / engine.info.ep_size,
    )


def _add_snapshot(snapshots: deque[Snapshot], new: Snapshot) -> None:
    """The newest always stays; before it, one per SNAPSHOT_SPACING_S."""
    if len(snapshots) >= 2 and snapshots[-1].time_s - snapshots[-2].time_s < SNAPSHOT_SPACING_S:
        snapshots.pop()
    snapshots.append(new)


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


def _new_errors(engine: Engine, report: Report) -> list[Change]:
    """One for each kind of error that this rank has counted more of than it had said."""
    before = engine.reports[report.rank].errors if report.rank in engine.reports else {}
    name = engine.info.engine
    return [
        Change(
            EventKind.ENGINE_ERROR,
            name,
            f"rank {report.rank} of engine {name}: {kind}, {count} times so far; its log says more",
            {"rank": report.rank, "error": kind, "count": count},
        )
        for kind, count in sorted(report.errors.items())
        if count > before.get(kind, 0)
    ]


def _apply_failed(engine: Engine, report: Report) -> Change:
    message = f"engine {engine.info.engine} refused a directive: {engine.last_apply_error}"
    return Change(
        EventKind.APPLY_FAILED,
        engine.info.engine,
        message,
        {"rank": report.rank, "held_revision": report.held_revision},
    )
