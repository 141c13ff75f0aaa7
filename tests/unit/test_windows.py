"""What the scheduler knows of engines: loads as differences of counters, states, and which reports are believed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from llep.messages import (
    STEP_PHASES,
    Array,
    Histogram,
    PlacementOrder,
    PlanSample,
    Report,
    Worth,
    decode_header,
    encode,
)
from llep.scheduler.admit import Refusal, Refused, decode
from llep.scheduler.desired import Desired
from llep.scheduler.rings import Increments, Ring
from llep.scheduler.show import settings_view
from llep.scheduler.show_loads import ground_of, history, hot, loads, matrix
from llep.scheduler.totals import Totals
from llep.scheduler.windows import FORGET_AFTER_S, Windows
from llep.views import EngineState, EventKind
from tests.scheduler.peer import BYTES_PER_SLOT, Workers


def hear(windows: Windows, workers: Workers, now_s: float) -> list[EventKind]:
    """All ranks report, rank 0 last as agents do it; what came of it."""
    return [change.kind for report in reversed(workers.reports()) for change in windows.take(report, now_s)]


def run(windows: Windows, workers: Workers, from_s: int, to_s: int) -> None:
    """One step and one report per second."""
    for now_s in range(from_s, to_s):
        workers.step()
        hear(windows, workers, now_s)


@pytest.mark.parametrize(("window_s", "steps"), [(10, 10), (1, 1), (0.5, 1), (59, 59), (1000, 59)])
def test_loads_are_those_of_the_window(window_s: float, steps: int) -> None:
    windows, workers = Windows(), Workers(ep_size=4)
    run(windows, workers, 0, 60 - steps)
    routed_LE, computed_LR, decisions = copy.deepcopy((workers.routed_LE, workers.computed_LR, workers.decisions))
    imbalance_LS, lends = workers.imbalance_LS.copy(), workers.lends_R.sum()
    run(windows, workers, 60 - steps, 60)
    found = loads(windows.engines["tiny"], window_s, now_s=59.5)
    assert found.window_s == steps
    assert found.tokens == 100 * steps
    assert found.layer_steps == 3 * steps
    routed_R = (workers.routed_LE - routed_LE).sum(axis=0).reshape(4, 2).sum(axis=1)
    assert [rank.routed_tokens for rank in found.ranks] == routed_R.tolist()
    assert [r.computed_tokens for r in found.ranks] == (workers.computed_LR - computed_LR).sum(axis=0).tolist()
    mean_S = (workers.imbalance_LS - imbalance_LS).sum(axis=0) / (3 * steps)
    assert (found.imbalance_ratio_before, found.imbalance_ratio_after) == pytest.approx(tuple(mean_S))
    assert found.imbalance_ratio_before > 3 and found.imbalance_ratio_after < 1.1
    assert found.lends == workers.lends_R.sum() - lends
    assert found.lend_bytes == found.lends * BYTES_PER_SLOT
    assert found.spilled_tokens == 10 * found.lends
    assert found.decisions == {"lend": workers.decisions["lend"] - decisions["lend"]}
    assert found.layer_seconds == pytest.approx(0.001 * steps)
    prefill, decode = (loads(windows.engines["tiny"], window_s, now_s=59.5, phase=each) for each in STEP_PHASES)
    assert prefill == found
    assert (decode.lends, decode.lend_bytes, decode.spilled_tokens, decode.decisions) == (0, 0, 0, {})


def test_what_a_new_engine_did_before_its_first_report_counts() -> None:
    windows, workers = Windows(), Workers()
    workers.step()
    workers.step()
    workers.counting_s = 3.0
    hear(windows, workers, 100)
    found = loads(windows.engines["tiny"], 60, now_s=100)
    assert (found.window_s, found.tokens, found.layer_steps) == (3.0, 200, 6)


def test_a_placement_is_weighed_by_what_was_since_it_came_on() -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 20)
    workers.placement = PlacementOrder(1, ((0, 0, 1),), 1 << 20)
    run(windows, workers, 20, 24)
    engine = windows.engines["tiny"]
    ground = ground_of(engine, engine.start, (), (1, 1), now_s=23.0)
    assert ground.evidence.window_s == 3.0 and ground.evidence.tokens_P.sum() == 300
    workers.placement = None
    run(windows, workers, 24, 26)
    assert ground_of(engine, engine.start, (), (1, 1), now_s=25.0).evidence.window_s == 1.0


def test_an_idle_engine_has_no_ratio() -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 10)
    for now_s in range(10, 20):
        hear(windows, workers, now_s)
    found = loads(windows.engines["tiny"], 5, now_s=20)
    assert (found.tokens, found.layer_steps, found.window_s) == (0, 0, 5)
    assert found.imbalance_ratio_before is None and found.imbalance_ratio_after is None


def test_an_engine_that_is_gone_has_no_loads() -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 10)
    assert loads(windows.engines["tiny"], 5, now_s=13).tokens == 500
    found = loads(windows.engines["tiny"], 5, now_s=60)
    assert (found.tokens, found.window_s) == (0, 0)


def test_windows_reach_back_for_hours_in_coarser_steps() -> None:
    windows, workers = Windows(), Workers(ep_size=2)
    for second in range(0, 3 * 3600, 10):
        workers.step(10_000)
        hear(windows, workers, second)
    engine, last_s = windows.engines["tiny"], 3 * 3600 - 10
    for window_s, step_s in ((500, 10), (3000, 10), (2.5 * 3600, 60)):
        found = loads(engine, window_s, last_s)
        assert window_s <= found.window_s <= window_s + step_s
        assert found.tokens == 1000 * found.window_s
        points = history(engine, window_s, 60.0, lambda at_s: at_s + 1e9)
        assert sum(point.tokens for point in points) == pytest.approx(found.tokens, abs=70_000)
        assert [point.time_s for point in points] == sorted(point.time_s for point in points)
        assert points[-1].time_s == last_s + 1e9 and len(points) == pytest.approx(window_s / 60, abs=2)
    by_expert = matrix(engine, "expert", "before", 120.0, None)
    assert by_expert.window_s == 120.0 and np.sum(by_expert.values) == 12 * 10_000 * 2 * 3
    assert matrix(engine, "rank", "after", 1200.0, None).window_s == pytest.approx(1200.0, abs=60)
    assert {expert.hot_for_s for expert in hot(engine, 6, 60.0, ())} == {last_s}


def test_reports_by_the_tenth_of_a_second_take_no_more_memory() -> None:
    windows, workers = Windows(), Workers()
    for tenth in range(1200):
        hear(windows, workers, tenth / 10)
    totals = windows.engines["tiny"].totals
    assert [len(ring) for ring in totals._rings] == [120, 12, 2]
    assert [len(ring) for ring in totals._expert_rings] == [21, 12, 2]
    assert totals.newest_s == 119.9


@pytest.mark.parametrize("window_s", [1, 3, 20])
def test_experts_are_known_by_the_second(window_s: int) -> None:
    windows, workers = Windows(), Workers(ep_size=4)
    run(windows, workers, 0, 60 - window_s)
    routed_LE, computed_LR = workers.routed_LE.copy(), workers.computed_LR.copy()
    run(windows, workers, 60 - window_s, 60)
    engine = windows.engines["tiny"]
    by_expert = matrix(engine, "expert", "before", window_s, None)
    assert by_expert.window_s == window_s and by_expert.values == (workers.routed_LE - routed_LE).tolist()
    assert matrix(engine, "rank", "after", window_s, None).values == (workers.computed_LR - computed_LR).tolist()


def test_a_huge_engine_gets_a_shorter_memory() -> None:
    totals = Totals(ep_size=2560, num_layers=58, num_experts=2560)
    seconds, *others = totals._expert_rings
    assert isinstance(seconds, Increments) and 10 <= (seconds._times.maxlen or 0) < 21
    rings = [*totals._rings, *(ring for ring in others if isinstance(ring, Ring))]
    assert len(rings) == 5 and all(ring._rows.nbytes <= 32 << 20 for ring in rings)
    assert all(len(ring._times) >= 10 for ring in rings)


def test_counts_beyond_32_bits_are_right_in_every_window() -> None:
    windows, workers = Windows(), Workers()
    workers.routed_LE[:] = (1 << 40) // 4
    workers.tokens_L[:] = (1 << 40) // 2
    workers.computed_LR[:] = (1 << 40) // 2
    run(windows, workers, 0, 61)
    found = matrix(windows.engines["tiny"], "expert", "before", 60.0, None)
    assert np.sum(found.values) == 60 * 100 * 2 * 3


def test_lost_and_doubled_reports_are_counted() -> None:
    windows, workers = Windows(), Workers()
    hear(windows, workers, 0)
    workers.reports()
    workers.reports()
    workers.step()
    assert hear(windows, workers, 1) == []
    engine = windows.engines["tiny"]
    assert (engine.lost, engine.doubled) == (4, 0)  # two of each rank
    for report in list(engine.reports.values()):
        assert windows.take(report, 2) == []
    assert (engine.lost, engine.doubled) == (4, 2)
    assert loads(engine, 10, 2.0).tokens == 100
    windows.tick(2.0 + FORGET_AFTER_S + 1, {})
    assert windows.engines == {} and (windows.lost, windows.doubled) == (4, 2)  # totals never fall


def test_machines_of_one_engine_may_have_their_settings_from_different_sources() -> None:
    windows, workers = Windows(), Workers()
    by_rank = {0: "file /etc/llep.yaml", 1: "environment"}
    for rank, report in reversed(list(enumerate(workers.reports()))):
        sources = dict.fromkeys(report.info.settings, by_rank[rank])
        info = msgspec.structs.replace(report.info, setting_sources=sources)
        windows.take(msgspec.structs.replace(report, info=info), 0.0)
    engine = windows.engines["tiny"]
    assert engine.state is EngineState.LIVE and not engine.refused
    shown = settings_view(engine, Desired()).settings
    assert {setting.source for setting in shown} == {by_rank[0]}


def test_states() -> None:
    windows, workers = Windows(), Workers()
    first, second = workers.reports()
    assert windows.take(first, 0.0) == []
    engine = windows.engines["tiny"]
    assert engine.state is EngineState.STARTING and engine.held_revision == 0
    (change,) = windows.take(second, 1.0)
    assert change.kind is EventKind.ENGINE_UP and engine.state is EngineState.LIVE
    assert windows.tick(4.9, {}) == []
    windows.take(workers.reports()[1], 5.0)
    (change,) = windows.tick(5.1, {})
    assert change.kind is EventKind.ENGINE_STALE and "no report from ranks 0" in change.message
    assert engine.state is EngineState.STALE
    assert windows.tick(6.0, {}) == []
    assert hear(windows, workers, 7.0) == [EventKind.ENGINE_UP]
    windows.tick(7.0 + FORGET_AFTER_S - 1, {})
    assert "tiny" in windows.engines
    windows.tick(7.0 + FORGET_AFTER_S + 1, {})
    assert windows.engines == {}


def test_an_engine_that_reports_seldom_is_not_stale_between_reports() -> None:
    windows, workers = Windows(), Workers(report_interval_s=100.0)
    hear(windows, workers, 0.0)
    windows.tick(499.0, {})
    assert windows.engines["tiny"].state is EngineState.LIVE
    windows.tick(501.0, {})
    assert windows.engines["tiny"].state is EngineState.STALE


def test_an_engine_told_to_report_seldom_is_not_stale_either() -> None:
    windows, workers = Windows(), Workers()
    hear(windows, workers, 0.0)
    windows.tick(100.0, {"tiny": 30.0})
    assert windows.engines["tiny"].state is EngineState.LIVE


def test_a_new_start_replaces_the_old_one() -> None:
    windows, old = Windows(), Workers()
    run(windows, old, 0, 10)
    new = Workers(ep_size=4, seed=1)
    assert hear(windows, new, 10.0) == [EventKind.ENGINE_RESTARTED, EventKind.ENGINE_UP]
    engine = windows.engines["tiny"]
    assert engine.info.ep_size == 4 and loads(engine, 60, now_s=10.0).tokens == 0
    with pytest.raises(Refused, match="give each engine a name of its own with LLEP_ENGINE") as refused:
        windows.take(old.reports()[0], 11.0)
    assert refused.value.reason is Refusal.REPLACED
    assert engine.refused == {"replaced": 1} and engine.info.ep_size == 4


@pytest.mark.parametrize("jump_s", [-3e8, 3e8])
def test_a_worker_whose_clock_jumps_is_heard_as_before(jump_s: float) -> None:
    windows, workers = Windows(), Workers()
    hear(windows, workers, 0.0)
    for now_s in (1.0, 2.0):
        workers.step()
        for report in workers.reports():
            jumped = msgspec.structs.replace(
                report, time_s=report.time_s + jump_s, live_since_time_s=report.live_since_time_s + jump_s
            )
            assert windows.take(jumped, now_s) == []
    engine = windows.engines["tiny"]
    assert engine.state is EngineState.LIVE and engine.refused == {} and engine.last_seen_s == 2.0
    assert loads(engine, 2.0, now_s=2.0).tokens == 200


@pytest.mark.parametrize(("silent_s", "state"), [(100.0, EngineState.STARTING), (1000.0, EngineState.STALE)])
def test_an_engine_from_the_store_is_not_live_until_it_reports(silent_s: float, state: EngineState) -> None:
    windows, workers = Windows(), Workers()
    windows.restore(workers.info(), workers.incarnation, 5000.0 - silent_s, 5000.0)
    engine = windows.engines["tiny"]
    assert engine.state is state and loads(engine, 10, now_s=5000.0).tokens == 0
    assert windows.tick(5001.0, {}) == []
    assert hear(windows, workers, 5002.0) == [EventKind.ENGINE_UP]
    assert windows.engines["tiny"] is engine


def test_an_engine_that_went_while_no_scheduler_was_there_is_said_to_be_gone() -> None:
    windows, workers = Windows(), Workers()
    windows.restore(workers.info(), workers.incarnation, 4990.0, 5000.0)
    (change,) = windows.tick(5006.0, {})
    assert change.kind is EventKind.ENGINE_STALE and "no report from ranks 0, 1" in change.message


def test_a_refused_directive_is_an_event_once() -> None:
    windows, workers = Windows(), Workers()
    hear(windows, workers, 0.0)
    workers.last_apply_error = "slots_per_rank can't change"
    assert hear(windows, workers, 1.0) == [EventKind.APPLY_FAILED]
    assert hear(windows, workers, 2.0) == []
    assert windows.engines["tiny"].last_apply_error == "slots_per_rank can't change"


def test_errors_are_an_event_once_a_minute_for_each_kind() -> None:
    windows, workers = Windows(), Workers()
    hear(windows, workers, 0)
    changes = []
    for now_s in range(1, 100):
        workers.errors = {"verify/output_differs": now_s, **({"plan/failed": 1} if now_s > 5 else {})}
        reports = workers.reports()
        for report in reports if now_s > 1 else reports[1:]:
            changes += [(now_s, change) for change in windows.take(report, now_s)]
        changes += [(now_s, change) for change in windows.tick(now_s, {})]
    changes += [(now_s, change) for now_s in range(100, 200) for change in windows.tick(now_s, {"tiny": 1e3})]
    assert {change.kind for _, change in changes} == {EventKind.ENGINE_ERROR}
    assert [(now_s, change.data["error"], change.data["count"], change.data["ranks"]) for now_s, change in changes] == [
        *((1, "verify/output_differs", 1, [1]), (6, "plan/failed", 1, [0])),
        *((61, "verify/output_differs", 61 + 60, [0, 1]), (66, "plan/failed", 2, [0, 1])),
        (121, "verify/output_differs", 2 * 99, [0, 1]),
    ]
    assert changes[2][1].message == (
        "engine tiny: verify/output_differs, 121 times so far, on ranks 0, 1; its log says more"
    )


def test_a_doubled_report_does_no_harm() -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 3)
    workers.step()
    reports = workers.reports()
    for now_s in (3.0, 4.0):
        for report in reports:
            assert windows.take(decode(encode(report)), now_s) == []
    engine = windows.engines["tiny"]
    assert engine.refused == {} and engine.last_seen_s == 3.0 and engine.doubled == 2 and engine.lost == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_reports_are_refused_in_a_row_is_believed_anew(rank: int) -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 5)
    workers.step()
    absurd = of_report(seq=1 << 40, step=1 << 40, layer_seconds={"prefill": 1e6, "decode": 0.0})
    windows.take(absurd(workers.reports()[rank]), 5.0)
    engine, changes, refused = windows.engines["tiny"], [], []
    for now_s in range(6, 20):
        workers.step()
        for report in reversed(workers.reports()):
            try:
                changes += windows.take(report, now_s)
            except Refused as refusal:
                refused.append((report.rank, refusal.reason))
    assert refused == [(rank, Refusal.ORDER)] * 5 and engine.refused == {"order": 5}
    (change,) = (change for change in changes if change.kind is EventKind.REPORT_REFUSED)
    assert change.data["rank"] == rank
    assert change.message.startswith(f"rank {rank} of engine tiny is believed anew")
    found = loads(engine, 8.0, now_s=19.0)
    assert (found.tokens, found.window_s) == (800, 8.0) and found.layer_seconds == pytest.approx(0.008)
    assert all(point.layer_seconds >= 0 and point.tokens >= 0 for point in history(engine, 60.0, 1.0, float))


def test_a_rank_believed_anew_must_be_right_by_itself() -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 5)
    for now_s in range(5, 15):
        workers.step()
        with pytest.raises(Refused, match="memory_used_bytes holds -1"):
            windows.take(of_report(memory_used_bytes=-1)(workers.reports()[0]), now_s)
    engine = windows.engines["tiny"]
    assert engine.reports[0].memory_used_bytes == 0 and len(engine.totals.series(60.0, 1.0)[0]) == 5
    hear(windows, workers, 15)
    assert loads(engine, 15.0, now_s=15.0).tokens == 1400  # nothing is begun anew where that wasn't needed


@pytest.mark.parametrize("late_s", [0, 1, 10])
@pytest.mark.parametrize("counting_s", [100.0, 86400.0])
def test_what_late_ranks_did_before_is_not_counted_as_now(late_s: int, counting_s: float) -> None:
    """After a scheduler's restart rank 0 may be heard first."""
    windows, workers = Windows(), Workers(ep_size=4)
    workers.step_number, workers.counting_s = 3_000_000, counting_s
    for now_s in range(100, 130):
        workers.step()
        rank_0, *others = workers.reports()
        windows.take(rank_0, now_s)
        for report in others if now_s >= 100 + late_s else ():
            windows.take(report, now_s)
    engine = windows.engines["tiny"]
    found = loads(engine, 29.0, now_s=129.0)
    assert found.tokens == 2900 and found.layer_seconds == pytest.approx(0.029, abs=0.001)
    assert all(point.layer_seconds == pytest.approx(0.001, abs=0.001) for point in history(engine, 28.0, 1.0, float))


def test_the_first_seconds_of_a_new_engine_count_whichever_rank_is_heard_first() -> None:
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        windows, workers = Windows(), Workers(ep_size=4)
        for _ in range(5):
            workers.step()
        workers.counting_s = 2.0
        reports = workers.reports()
        for rank in order:
            windows.take(reports[rank], 100.0)
        workers.step()
        hear(windows, workers, 101.0)
        found = loads(windows.engines["tiny"], 60.0, now_s=101.0)
        assert (found.window_s, found.tokens) == (3.0, 600) and found.layer_seconds == pytest.approx(0.006)


Spoil = Callable[[Report], Report]


def of_report(**changes: Any) -> Spoil:
    return lambda report: msgspec.structs.replace(report, **changes)


def of_info(**changes: Any) -> Spoil:
    return lambda report: msgspec.structs.replace(report, info=msgspec.structs.replace(report.info, **changes))


def of_group(**changes: Any) -> Spoil:
    return lambda report: msgspec.structs.replace(report, group=msgspec.structs.replace(report.group, **changes))


def of_array(name: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(report: Report) -> Report:
        values = getattr(report.group, name).numpy().copy()
        changed = change(values)
        return of_group(**{name: Array.of(values if changed is None else changed)})(report)

    return spoil


def set_item(index: Any, value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> None:
        values[index] = value

    return change


def bogus(name: str, **changes: Any) -> Spoil:
    return lambda report: of_group(**{name: msgspec.structs.replace(getattr(report.group, name), **changes)})(report)


def sample(**changes: Any) -> PlanSample:
    plan = PlanSample(
        id=1,
        step=1,
        layer=0,
        phase="prefill",
        time_s=1.0,
        decision="lend",
        tokens=10,
        routed_R=(15, 5),
        computed_R=(10, 10),
        lends=((0, 0, 1, 5),),
        predicted_gain_s=-0.1,
        layer_seconds=0.1,
    )
    return msgspec.structs.replace(plan, **changes)


REFUSED = {
    "protocol": (of_report(protocol=1), Refusal.PROTOCOL),
    "same seq": (of_report(seq=3), Refusal.ORDER),
    "older seq": (of_report(seq=-5), Refusal.ORDER),
    "no such rank": (of_report(rank=7, group=None), Refusal.RANK),
    "negative rank": (of_report(rank=-1, group=None), Refusal.RANK),
    "rank 0 without group": (of_report(group=None), Refusal.SHAPE),
    "rank 1 with group": (of_report(rank=1), Refusal.SHAPE),
    "another model": (of_info(model_name="other"), Refusal.ENGINE),
    "more experts": (of_info(num_experts=8), Refusal.ENGINE),
    "steps key": (of_report(steps={"warmup": 3}), Refusal.SHAPE),
    "phase key": (of_report(phase_seconds={"prefill": {"think": Histogram((0,) * 7, 0.0)}}), Refusal.SHAPE),
    "buckets": (of_report(phase_seconds={"prefill": {"plan": Histogram((0,) * 6, 0.0)}}), Refusal.SHAPE),
    "many errors": (of_report(errors={f"a/{n}": 1 for n in range(100)}), Refusal.SHAPE),
    "long error": (of_report(last_apply_error="x" * 20_000), Refusal.SHAPE),
    "step phase key": (of_report(phase_seconds={"dream": {}}), Refusal.SHAPE),
    "decision key": (of_group(decisions={"prefill": {"guess": 1}}), Refusal.SHAPE),
    "decision phase": (of_group(decisions={"dream": {}}), Refusal.SHAPE),
    "negative step": (of_report(step=-1), Refusal.COUNT),
    "absurd step": (of_report(step=(1 << 63) - 1), Refusal.COUNT),
    "less than before": (of_report(step=0), Refusal.COUNT),
    "lost key": (of_report(steps={}), Refusal.COUNT),
    "negative seconds": (of_report(layer_seconds={"prefill": -0.1, "decode": 0.0}), Refusal.COUNT),
    "endless seconds": (of_report(layer_seconds={"prefill": float("inf"), "decode": 0.0}), Refusal.COUNT),
    "no time": (of_report(time_s=float("nan")), Refusal.COUNT),
    "negative memory": (of_report(memory_used_bytes=-1), Refusal.COUNT),
    "negative bytes per lend": (of_group(bytes_per_lend=-1), Refusal.COUNT),
    "negative placement": (of_report(live_placement=-1), Refusal.COUNT),
    "worth of nobody": (of_report(worth={"warmup": Worth()}), Refusal.SHAPE),
    "worth less than nothing": (of_report(worth={"prefill": Worth(lent_s=-1.0)}), Refusal.COUNT),
    "home at no rank": (of_array("home_rank_LE", set_item((0, 0), 2)), Refusal.COUNT),
    "wide homes": (of_array("home_rank_LE", lambda v: v.astype(np.int64)), Refusal.SHAPE),
    "plan of no layer": (of_group(plans=(sample(layer=3),)), Refusal.SHAPE),
    "plan of three ranks": (of_group(plans=(sample(routed_R=(1, 2, 3)),)), Refusal.SHAPE),
    "plan to no rank": (of_group(plans=(sample(lends=((0, 0, 2, 5),)),)), Refusal.COUNT),
    "plan in no time": (of_group(plans=(sample(layer_seconds=float("nan")),)), Refusal.COUNT),
    "plan twice": (of_group(plans=(sample(), sample())), Refusal.SHAPE),
    "too many plans": (of_group(plans=tuple(sample(id=n) for n in range(99))), Refusal.SHAPE),
    "settings": (of_report(live_settings={"imbalance_threshold": 0.5}), Refusal.SETTINGS),
    "unknown settings": (of_report(live_settings={"swing": 1}), Refusal.SETTINGS),
    "wrong shape": (of_array("routed_PLE", lambda v: v[:, :, :3]), Refusal.SHAPE),
    "one layer more": (of_array("tokens_PL", lambda v: np.c_[v, [0, 0]]), Refusal.SHAPE),
    "float counts": (of_array("tokens_PL", lambda v: v.astype(np.float64)), Refusal.SHAPE),
    "objects": (bogus("tokens_PL", dtype="|O"), Refusal.SHAPE),
    "no dtype": (bogus("tokens_PL", dtype="zebra"), Refusal.SHAPE),
    "short data": (bogus("tokens_PL", data=b"123"), Refusal.SHAPE),
    "negative shape": (bogus("tokens_PL", shape=(-1,)), Refusal.SHAPE),
    "negative count": (of_array("routed_PLE", set_item((0, 1, 1), -5)), Refusal.COUNT),
    "absurd count": (of_array("routed_PLE", set_item((0, 1, 1), np.iinfo(np.int64).max)), Refusal.COUNT),
    "decreasing count": (of_array("tokens_PL", set_item((0, 0), 0)), Refusal.COUNT),
    "NaN": (of_array("imbalance_sum_PLS", set_item((0, 0, 0), np.nan)), Refusal.COUNT),
    "computed in a phase without tokens": (of_array("computed_PLR", set_item((1, 0, 0), 1)), Refusal.SUMS),
    "computed is not routed": (of_array("computed_PLR", lambda v: v + 1), Refusal.SUMS),
    "a token too many": (of_array("tokens_PL", lambda v: v + 1), Refusal.SUMS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason_and_no_harm(name: str) -> None:
    spoil, reason = REFUSED[name]
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 3)
    workers.step()
    good = workers.reports()
    before = loads(windows.engines["tiny"], 10, 3.0)
    with pytest.raises(Refused) as refused:
        windows.take(decode(encode(spoil(good[0]))), 3.0)
    assert refused.value.reason is reason, refused.value
    assert loads(windows.engines["tiny"], 10, 3.0) == before
    for report in good:
        assert windows.take(report, 3.0) == []
    assert loads(windows.engines["tiny"], 10, 3.0).tokens == before.tokens + 100


@pytest.mark.parametrize("data", [b"", b"\xff", b"hello", encode(Workers().report(0))[:-3]])
def test_garbled(data: bytes) -> None:
    with pytest.raises(Refused) as refused:
        decode(data)
    assert refused.value.reason is Refusal.GARBLED


@pytest.mark.parametrize("rank", [0, 1])
def test_every_flipped_bit_is_noticed(rank: int) -> None:
    windows, workers = Windows(), Workers()
    run(windows, workers, 0, 3)
    workers.step()
    garbled = bytearray(encode(workers.reports()[rank]))
    header = decode_header(bytes(garbled))
    for place, bit in itertools.product(range(len(garbled)), range(8)):
        garbled[place] ^= 1 << bit
        with pytest.raises(Refused) as refused:
            windows.take(decode(bytes(garbled)), 3.0)
        assert refused.value.reason in (Refusal.GARBLED, Refusal.PROTOCOL)
        with contextlib.suppress(ValueError):  # or the agent would take it for one of another start or rank
            assert decode_header(bytes(garbled)) == header
        garbled[place] ^= 1 << bit
    assert windows.take(decode(bytes(garbled)), 3.0) == []


def test_a_report_of_an_older_protocol_is_known_as_one() -> None:
    """Up to protocol 2 there was neither envelope nor checksum."""
    old = msgspec.msgpack.encode(msgspec.structs.replace(Workers().report(0), protocol=2))
    assert decode_header(old).info.engine == "tiny"
    with pytest.raises(Refused, match="protocol 2 is not") as refused:
        decode(old)
    assert refused.value.reason is Refusal.PROTOCOL


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        *({"ep_size": 0}, {"ep_size": 1 << 20}, {"num_experts": -1}, {"layer_numbers": ()}, {"engine": ""}),
        *({"bytes_per_slot": -7}, {"slots_per_rank": -3}, {"replica_slots_per_rank": -1}, {"max_model_len": -1}),
        {"layer_numbers": tuple(range(10_000)), "num_experts": 4096},
        {"layer_numbers": tuple(range(10_000)), "ep_size": 1 << 14},
        {"replica_slots_per_rank": 1 << 60},
        {"slots_per_rank": 1 << 31, "bytes_per_slot": 1 << 31},
    ],
)
def test_an_engine_that_can_not_be(changes: dict[str, Any], rank: int) -> None:
    windows, report = Windows(), of_info(**changes)(Workers().report(rank))
    tracemalloc.start()
    with pytest.raises(Refused) as refused:
        windows.take(report, 0.0)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.reason is Refusal.ENGINE and windows.engines == {}
    assert most_bytes < 1 << 20


def test_a_report_that_does_not_fit_its_own_engine_takes_no_memory() -> None:
    windows, report = Windows(), of_info(layer_numbers=tuple(range(58)), num_experts=256)(Workers().report(0))
    tracemalloc.start()
    with pytest.raises(Refused) as refused:
        windows.take(report, 0.0)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.reason is Refusal.SHAPE and windows.engines == {} and most_bytes < 1 << 20


def test_memory_is_bounded_over_all_engines() -> None:
    windows = Windows()
    huge = dict(layer_numbers=tuple(range(58)), num_experts=2560, ep_size=2560)
    with pytest.raises(Refused, match="windows of all engines") as refused:
        for number in range(100):
            windows.take(of_info(engine=str(number), **huge)(Workers().report(1)), 0.0)
    assert refused.value.reason is Refusal.ENGINE and 10 < len(windows.engines) < 50
    with pytest.raises(Refused, match="windows of all engines"):
        windows.restore(of_info(engine="one more", **huge)(Workers().report(1)).info, "x", 0.0, 0.0)
    again = of_info(engine="0", **huge)(Workers().report(1))
    assert [change.kind for change in windows.take(again, 1.0)] == [EventKind.ENGINE_RESTARTED]
