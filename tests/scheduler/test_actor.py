"""The Scheduler without Ray around it: changes, temporary modes, a lost store, events, refusals."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llep.errors import LlepError, RevisionConflict, SettingsError, StoreUnavailable, UnknownEngine, UnknownRevision
from llep.messages import decode_directive, decode_snapshot, encode
from llep.scheduler.actor import Scheduler
from llep.scheduler.desired import EVERY
from llep.scheduler.store import FILE, KnownEngine, Store
from tests.scheduler.peer import Workers


@asynccontextmanager
async def scheduler_in(folder: Path) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(str(folder))
    try:
        yield scheduler
    finally:
        if scheduler._ticking is not None:
            scheduler._ticking.cancel()
        scheduler._journal._close("over")


async def hear(scheduler: Scheduler, workers: Workers) -> list[str]:
    """A step and a report of all ranks, with the directive taken; why reports were refused."""
    workers.step()
    answer = await scheduler.report([encode(report) for report in workers.reports()], workers.held_revision)
    if answer["directive"] is not None:
        workers.take(decode_directive(answer["directive"]))
    return list(answer["refused"])


async def hear_for_ever(scheduler: Scheduler, *engines: Workers) -> None:
    while True:
        for workers in engines:
            await hear(scheduler, workers)
        await asyncio.sleep(0.02)


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def value(view: dict[str, Any], key: str) -> tuple[Any, str]:
    (found,) = [setting for setting in view["settings"] if setting["key"] == key]
    return found["value"], found["source"]


def test_a_change_is_stored_shown_and_live(tmp_path: Path) -> None:
    async def body() -> None:
        workers, other = Workers("one"), Workers("two", watchdog_s=7)
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, workers)
            hearing = asyncio.create_task(hear_for_ever(scheduler, workers, other))
            await asyncio.sleep(0.1)
            change = await scheduler.patch_settings({"watchdog_s": 9}, "me", "to try")
            assert change["revision"] == 1 and change["diff"] == {"watchdog_s": [{"one": 60, "two": 7}, 9]}
            assert [(a["engine"], a["state"], a["revision"]) for a in change["applied"]] == [
                ("one", "live", 1),
                ("two", "live", 1),
            ]
            assert workers.live.watchdog_s == other.live.watchdog_s == 9
            assert value(await scheduler.settings("one"), "watchdog_s") == (9, "revision 1")
            assert value(await scheduler.settings("one"), "mode") == ("active", "environment")
            assert value(await scheduler.settings(), "watchdog_s") == (9, "revision 1")
            change = await scheduler.patch_settings({"watchdog_s": None}, "me", engines=["two"], if_revision=1)
            assert change["revision"] == 2 and change["diff"] == {"watchdog_s": [9, 7]}
            assert [a["engine"] for a in change["applied"]] == ["two"]
            engines = {view["id"]: view for view in await scheduler.engines()}
            assert (engines["one"]["desired_revision"], engines["two"]["desired_revision"]) == (1, 2)
            again = await scheduler.patch_settings({"watchdog_s": 9}, "me", engines=["one"], dry_run=True)
            assert again["dry_run"] and again["diff"] == {} and again["applied"] == []
            events = await scheduler.events(2)
            assert [(e["kind"], e["author"], e["message"]) for e in events] == [
                ("settings", "me", "watchdog_s=as started on engine two"),
                ("settings", "me", "watchdog_s=9 on all engines: to try"),
            ]
            assert await scheduler.events(1, before_id=events[0]["id"]) == events[1:]
            hearing.cancel()
        async with scheduler_in(tmp_path) as scheduler:
            assert (await scheduler.status())["desired_revision"] == 2
            assert value(await scheduler.settings(), "watchdog_s") == (9, "revision 1")
            assert {view["id"]: view["state"] for view in await scheduler.engines()} == dict.fromkeys(
                ("one", "two"), "starting"
            )

    run(body)


def test_several_models_and_several_engines_of_one_keep_apart(tmp_path: Path) -> None:
    """Two engines of one model and one of another, of another size: each has its own loads, settings and placement."""

    async def body() -> None:
        first, second = (Workers(name, seed=seed, replicas="suggest") for seed, name in enumerate(("a-0", "a-1")))
        other = Workers("b", ep_size=4, num_layers=5, seed=2, model_name="org/other", replicas="suggest")
        async with scheduler_in(tmp_path) as scheduler:
            for number, workers in enumerate((first, second, other), start=1):
                for _ in range(number):
                    await hear(scheduler, workers)
            views = {view["id"]: (view["model_name"], view["ep_size"]) for view in await scheduler.engines()}
            assert views == {"a-0": ("org/tiny", 2), "a-1": ("org/tiny", 2), "b": ("org/other", 4)}
            loads = {each["engine"]: each for each in await scheduler.loads(60.0)}
            assert {name: each["tokens"] for name, each in loads.items()} == {"a-0": 0, "a-1": 100, "b": 200}
            assert loads["b"]["model_name"] == "org/other" and len(loads["b"]["ranks"]) == 4
            matrix = await scheduler.matrix("b", "expert", "before", 60.0)
            assert (len(matrix["values"]), len(matrix["values"][0])) == (5, 8)
            await scheduler.patch_settings({"watchdog_s": 9}, "me", engines=["a-0"], wait_s=0)
            await scheduler.placement_apply("b", "me", replicas=[{"layer": 4, "expert": 0, "rank": 3}])
            for workers in (first, second, other) * 2:
                await hear(scheduler, workers)
            assert [each.live.watchdog_s for each in (first, second, other)] == [9, 60, 60]
            assert [each.placement is not None for each in (first, second, other)] == [False, False, True]
            assert [view["state"] for view in await scheduler.placement()] == ["none", "none", "live"]
            stays, _ = first.live_revision, await hear(scheduler, Workers("a-1", model_name="org/third"))
            assert {view["id"]: view["model_name"] for view in await scheduler.engines()}["a-1"] == "org/third"
            assert await hear(scheduler, first) == [] and first.live_revision == stays

    run(body)


def test_settings_go_back_to_an_earlier_revision(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            await hear(scheduler, workers)
            for threshold in (1.5, 1.6):
                await scheduler.patch_settings({"imbalance_threshold": threshold}, "me", wait_s=0)
            await scheduler.patch_settings({"watchdog_s": 9}, "me", "slow disk", engines=["one"], wait_s=0)
            trial = await scheduler.rollback(1, "you", dry_run=True)
            assert trial["diff"] == {"imbalance_threshold": [1.6, 1.5], "watchdog_s": [9, 60]}
            assert (await scheduler.status())["desired_revision"] == 3
            change = await scheduler.rollback(1, "you", "it was better", if_revision=3, wait_s=0)
            assert change["revision"] == 4 and change["diff"] == trial["diff"]
            assert value(await scheduler.settings("one"), "imbalance_threshold") == (1.5, "revision 1")
            assert (await scheduler.rollback(4, "you", wait_s=0))["revision"] == 4  # it holds already
            assert (await scheduler.rollback(0, "you", wait_s=0))["diff"] == {"imbalance_threshold": [1.5, 1.3]}
            with pytest.raises(UnknownRevision, match="no revision 77"):
                await scheduler.rollback(77, "you")
            with pytest.raises(RevisionConflict):
                await scheduler.rollback(1, "you", if_revision=3)
            found = await scheduler.revisions(limit=3)
            assert [(r["number"], r["author"], r["reason"]) for r in found] == [
                (5, "you", ""),
                (4, "you", "it was better"),
                (3, "me", "slow disk"),
            ]
            assert found[1]["diff"] == trial["diff"] and found[2]["engines"] == ["one"]
            assert [r["number"] for r in await scheduler.revisions(before=3)] == [2, 1]

    run(body)


def test_asking_for_what_holds_makes_no_revision(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            assert (await scheduler.patch_settings({"mode": "off"}, "me"))["revision"] == 1
            assert (await scheduler.patch_settings({"mode": "off"}, "me"))["revision"] == 1
            assert (await scheduler.set_mode("off", None, "me"))["revision"] == 1

    run(body)


REFUSED_CHANGES: dict[str, tuple[dict[str, Any], type[LlepError], str]] = {
    "unknown key": ({"patch": {"moode": "off"}}, SettingsError, "did you mean 'mode'"),
    "one bad of two": ({"patch": {"mode": "off", "watchdog_s": 1}}, SettingsError, "watchdog_s=1 is not valid"),
    "unknown engine": (
        {"engines": ["one", "ghost"]},
        UnknownEngine,
        "no engine named 'ghost' has reported; known: one",
    ),
    "nobody": ({"engines": []}, SettingsError, "addresses nobody"),
    "conflict": ({"if_revision": 5}, RevisionConflict, "at revision 1, not 5"),
    "long reason": ({"reason": "x" * 9999}, SettingsError, "reason has 9999 characters"),
}


@pytest.mark.parametrize("name", REFUSED_CHANGES)
def test_a_refused_change_leaves_everything(tmp_path: Path, name: str) -> None:
    arguments, error, message = REFUSED_CHANGES[name]

    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            await scheduler.patch_settings({"mode": "observe"}, "me", wait_s=0)
            before = await scheduler.settings("one"), await scheduler.events(100)
            with pytest.raises(error, match=message):
                await scheduler.patch_settings(**{"patch": {"watchdog_s": 9}, "author": "me", "wait_s": 0, **arguments})
            assert (await scheduler.settings("one"), await scheduler.events(100)) == before

    run(body)


def test_a_dry_run_says_what_would_be_and_does_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            change = await scheduler.patch_settings({"watchdog_s": 9}, "me", dry_run=True)
            assert change["diff"] == {"watchdog_s": [60, 9]} and change["revision"] == 0
            assert value(await scheduler.settings("one"), "watchdog_s") == (60, "environment")
            with pytest.raises(SettingsError):
                await scheduler.patch_settings({"watchdog_s": 1}, "me", dry_run=True)

    run(body)


def test_waiting_for_an_engine_that_is_away_or_slow(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            change = await scheduler.patch_settings({"watchdog_s": 9}, "me", wait_s=0.1)
            assert [a["state"] for a in change["applied"]] == ["sent"]
        store = Store(tmp_path)
        store.put_engines([KnownEngine(k.info, k.incarnation, k.last_seen_s - 3600) for k in store.engines()])
        store.close()
        async with scheduler_in(tmp_path) as scheduler:
            change = await scheduler.patch_settings({"watchdog_s": 10}, "me", wait_s=30)
            assert [a["state"] for a in change["applied"]] == ["away"]

    run(body)


def test_an_idle_engine_holds_a_revision(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            await hear(scheduler, workers)
            change = asyncio.create_task(scheduler.patch_settings({"watchdog_s": 9}, "me", wait_s=30))
            await asyncio.sleep(0.05)
            for _ in range(2):  # takes the directive, then says that it holds it; no step
                answer = await scheduler.report([encode(r) for r in workers.reports()], workers.held_revision)
                if answer["directive"]:
                    workers.take(decode_directive(answer["directive"]))
            assert [(a["state"], a["step"]) for a in (await change)["applied"]] == [("held", None)]

    run(body)


def test_long_poll_answers_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            assert await scheduler.wait_directive("one", workers.incarnation, 0, 0.05) is None
            await hear(scheduler, workers)
            polling = asyncio.create_task(scheduler.wait_directive("one", workers.incarnation, 0, 30))
            stranger = asyncio.create_task(scheduler.wait_directive("one", "another start", 0, 0.5))
            await asyncio.sleep(0.05)
            assert not polling.done()
            await scheduler.patch_settings({"watchdog_s": 9}, "me", wait_s=0)
            directive = await polling
            assert directive is not None
            decoded = decode_directive(directive)
            assert (decoded.engine, decoded.revision) == ("one", 1)
            assert decoded.settings == workers.start.changed({"watchdog_s": 9}).dump()
            assert await stranger is None

    run(body)


def test_a_mode_with_a_time_limit_goes_back(tmp_path: Path) -> None:
    async def body() -> None:
        workers = Workers("one")
        async with scheduler_in(tmp_path) as scheduler:
            hearing = asyncio.create_task(hear_for_ever(scheduler, workers))
            await scheduler.patch_settings({"mode": "observe"}, "me")
            change = await scheduler.set_mode("off", 0.5, "me")
            assert change["reverts_at_s"] == pytest.approx(time.time() + 0.5, abs=0.5)
            assert change["revision"] == 2
            while workers.live.mode != "observe":
                await asyncio.sleep(0.05)
            assert workers.live_revision == 3
            (event,) = await scheduler.events(1)
            assert (event["kind"], event["author"]) == ("mode", "llep")
            await scheduler.set_mode("off", 0.3, "me")
            hearing.cancel()
        await asyncio.sleep(0.4)
        async with scheduler_in(tmp_path) as scheduler:  # its time was over while nobody was there
            assert value(await scheduler.settings("one"), "mode") == ("observe", "revision 1")
            assert (await scheduler.status())["desired_revision"] == 5

    run(body)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_an_impossible_time_limit(tmp_path: Path, ttl_s: float) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            with pytest.raises(SettingsError, match="ttl_s="):
                await scheduler.set_mode("off", ttl_s, "me")
            assert (await scheduler.status())["desired_revision"] == 0

    run(body)


def test_a_lost_store_is_rebuilt_from_what_engines_run(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = Workers("one"), Workers("two", watchdog_s=7)
        async with scheduler_in(tmp_path) as scheduler:
            hearing = asyncio.create_task(hear_for_ever(scheduler, one, two))
            await asyncio.sleep(0.1)
            for threshold in (1.5, 1.6, 1.7):
                await scheduler.patch_settings({"imbalance_threshold": threshold}, "me")
            await scheduler.patch_settings({"mode": "shadow"}, "me", engines=["two"])
            hearing.cancel()
        for path in tmp_path.glob(f"{FILE}*"):
            path.write_bytes(b"broken" * 1000)
        before = one.live, two.live
        async with scheduler_in(tmp_path) as scheduler:
            for _ in range(3):
                assert await hear(scheduler, one) == []
                assert await hear(scheduler, two) == []
            assert (one.live, two.live) == before
            assert (one.live_revision, two.live_revision) == (4, 5)
            assert value(await scheduler.settings("two"), "mode") == ("shadow", "revision 5")
            kinds = [event["kind"] for event in await scheduler.events(100)]
            assert "store_set_aside" in kinds and kinds.count("settings") == 2
            change = await scheduler.patch_settings({"watchdog_s": 9}, "me", wait_s=0)
            assert change["revision"] == 6

    run(body)


@pytest.mark.parametrize("ahead", [1_000_001, 1 << 53, 1 << 62, (1 << 64) - 1])
def test_an_absurd_revision_of_one_engine_does_not_shut_the_others_out(tmp_path: Path, ahead: int) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            good, bad = Workers("good"), Workers("bad")
            assert await hear(scheduler, good) == []
            for held, live, placement in ((ahead, ahead, 0), (ahead, 0, 0), (0, ahead, 0), (0, 0, ahead)):
                report = msgspec.structs.replace(
                    bad.reports()[0], held_revision=held, live_revision=live, live_placement=placement
                )
                (why,) = (await scheduler.report([encode(report)], 0))["refused"]
                assert why.startswith("revision: ")
            await scheduler.patch_settings({"watchdog_s": 50}, "me", wait_s=0)
            for _ in range(3):
                assert await hear(scheduler, good) == await hear(scheduler, bad) == []
            assert good.live_revision == bad.live_revision == 1
            assert [revision["number"] for revision in await scheduler.revisions()] == [1]

    run(body)


def test_revisions_of_a_lost_store_are_believed_far_above_what_is_known(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            for step, name in enumerate(("one", "two"), start=1):
                workers = Workers(name)
                workers.held_revision = workers.live_revision = step * 900_000
                assert await hear(scheduler, workers) == await hear(scheduler, workers) == []
            assert (await scheduler.status())["desired_revision"] == 1_800_001

    run(body)


def test_without_a_store_engines_are_seen_but_nothing_changes(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path), scheduler_in(tmp_path) as second:
            workers = Workers("one")
            assert await hear(second, workers) == []
            assert [view["state"] for view in await second.engines()] == ["live"]
            status = await second.status()
            assert not status["store_open"] and "in use by another scheduler" in status["store_problem"]
            with pytest.raises(StoreUnavailable, match="set LLEP_STATE_DIR"):
                await second.patch_settings({"mode": "off"}, "me")
            with pytest.raises(StoreUnavailable):
                await second.events(1)
            assert (await second.settings("one"))["revision"] == 0

    run(body)


def test_a_store_that_comes_late_is_taken_over(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as first:
            await first.patch_settings({"watchdog_s": 9}, "me", wait_s=0)
            second = Scheduler(str(tmp_path))
            workers = Workers("one")
            await hear(second, workers)
        second._keep_journal()
        await hear(second, workers)
        assert (workers.held_revision, second._journal.problem) == (1, "")
        assert [event["kind"] for event in await second.events(100)][::-1] == [
            *("scheduler_started", "settings", "scheduler_started", "engine_up")
        ]
        assert second._ticking is not None
        second._ticking.cancel()
        second._journal._close("over")

    run(body)


def test_refused_reports_are_counted_named_and_told_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            good, other = workers.reports()
            bad = encode(msgspec.structs.replace(other, step=-1))
            for _ in range(3):
                answer = await scheduler.report([b"nonsense", bad], 0)
                assert [text.partition(":")[0] for text in answer["refused"]] == ["garbled", "count"]
            assert await scheduler.engines() == []
            assert (await scheduler.report([encode(good)], 0))["refused"] == []
            assert (await scheduler.report([bad], 0))["refused"] != []
            status = await scheduler.status()
            assert (status["reports_total"], status["reports_refused_total"]) == (8, 7)
            assert status["reports_refused"] == {"garbled": 3, "count": 4}
            events = [(e["kind"], e["engine"]) for e in await scheduler.events(100)]
            assert events == [("report_refused", "one"), ("report_refused", None), ("scheduler_started", None)]

    run(body)


def test_metrics_hold_the_newest_report_of_every_rank(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            for _ in range(3):
                await hear(scheduler, workers)
            await scheduler.patch_settings({"watchdog_s": 9}, "me", wait_s=0)
            snapshot = decode_snapshot(await scheduler.metrics())
            (engine,) = snapshot.engines
            assert (engine.engine, engine.state, engine.desired_revision) == ("one", "live", 1)
            assert [rank.rank for rank in engine.ranks] == [0, 1]
            assert engine.speaker is not None and (engine.speaker.rank, engine.speaker.seq) == (0, 3)
            assert engine.speaker.group is not None and engine.hot_ratios
            assert engine.last_seen_s == pytest.approx(time.time(), abs=5)

    run(body)


def test_questions_about_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            assert await scheduler.loads(10) == []
            with pytest.raises(UnknownEngine, match="known: none"):
                await scheduler.loads(10, "ghost")
            with pytest.raises(UnknownEngine):
                await scheduler.settings("ghost")
            with pytest.raises(SettingsError, match="window_s=0"):
                await scheduler.loads(0)

    run(body)


def test_a_temporary_setting_of_an_engine_that_is_gone_ends_and_harms_nobody(tmp_path: Path, monkeypatch) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            for name in ("gone", "here"):
                await hear(scheduler, Workers(name))
            await scheduler.set_mode("observe", 600.0, "me", engines=["gone"], wait_s=0)
        weekend_s = 2 * 86400.0
        with sqlite3.connect(tmp_path / FILE) as db:
            db.execute("UPDATE engines SET last_seen_s = last_seen_s - ?", (weekend_s,))
        db.close()
        now_s = time.time
        monkeypatch.setattr(time, "time", lambda: now_s() + weekend_s)
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("here"))
            assert [view["id"] for view in await scheduler.engines()] == ["here"]
            (made,) = await scheduler.revisions(1)
            assert (made["author"], made["engines"], made["diff"]) == ("llep", ["gone"], {})
            assert scheduler._journal.desired.temporary == {}
            await scheduler.patch_settings({"watchdog_s": 50}, "me", wait_s=0)

    run(body)


@pytest.mark.parametrize("jump_s", [7200.0, -20 * 86400.0])
def test_what_is_set_for_a_time_keeps_its_length_when_the_clock_jumps(
    tmp_path: Path, monkeypatch, jump_s: float
) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            await scheduler.set_mode("off", 3.0, "me", wait_s=0)
            now_s = time.time
            monkeypatch.setattr(time, "time", lambda: now_s() + jump_s)
            assert value(await scheduler.settings("one"), "mode") == ("off", "revision 1")
            assert (await scheduler.status())["clock_jumps"] == 1
            (event,) = await scheduler.events(1, kinds=["clock_jumped"])
            assert event["data"]["seconds"] == pytest.approx(jump_s, abs=1.0)
            await asyncio.sleep(3.2)
            assert value(await scheduler.settings("one"), "mode") == ("active", "environment")

    run(body)


def test_a_jump_of_the_clock_while_nothing_can_be_stored_is_made_up_for_later(tmp_path: Path, monkeypatch) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            await scheduler.set_mode("off", 600.0, "me", wait_s=0)
            now_s = time.time
            scheduler._journal._store._db.execute("PRAGMA query_only = ON")  # writes fail, as on a disk gone read-only
            monkeypatch.setattr(scheduler._journal, "note", lambda *args, **kwargs: None)  # the move fails first
            monkeypatch.setattr(time, "time", lambda: now_s() + 7200.0)
            await scheduler.engines()
            assert scheduler._journal.problem and scheduler._journal.desired.revision == 1
            scheduler._journal._store._db.execute("PRAGMA query_only = OFF")
            await asyncio.sleep(2.5)
            assert not scheduler._journal.problem
            assert value(await scheduler.settings("one"), "mode") == ("off", "revision 1")
            (left_s,) = [o.until_s - time.time() for o in scheduler._journal.desired.temporary[EVERY].values()]
            assert 590.0 < left_s <= 600.0

    run(body)


def test_a_change_right_after_the_state_was_lost_comes_on_top_of_what_engines_run(tmp_path: Path) -> None:
    async def body() -> None:
        workers = Workers("one")
        async with scheduler_in(tmp_path) as scheduler:
            hearing = asyncio.create_task(hear_for_ever(scheduler, workers))
            await asyncio.sleep(0.1)
            await scheduler.patch_settings({"mode": "shadow"}, "me")
            await scheduler.patch_settings({"watchdog_s": 9}, "me")
            hearing.cancel()
        (tmp_path / FILE).write_bytes(b"damaged" * 1000)
        async with scheduler_in(tmp_path) as scheduler:
            changing = asyncio.create_task(scheduler.patch_settings({"watchdog_s": 8}, "me"))
            await asyncio.sleep(0.5)
            hearing = asyncio.create_task(hear_for_ever(scheduler, workers))
            change = await changing
            assert change["revision"] == 4 and change["diff"] == {"watchdog_s": [9, 8]}
            assert (workers.live.mode, workers.live.watchdog_s) == ("shadow", 8)
            hearing.cancel()

    run(body)


@pytest.mark.parametrize("changes", [1, 3])
def test_a_change_before_an_engine_of_a_lost_store_is_heard_holds(tmp_path: Path, changes: int) -> None:
    """Also where its number is the one that the engine has by chance."""

    async def body() -> None:
        workers = Workers("one")
        async with scheduler_in(tmp_path / "lost") as scheduler:
            await hear(scheduler, workers)
            for number in range(1, changes + 1):
                await scheduler.patch_settings({"mode": "shadow", "watchdog_s": 10 + number}, "me", wait_s=0)
            for _ in range(2):
                await hear(scheduler, workers)
            assert workers.live_revision == changes
        async with scheduler_in(tmp_path / "new") as scheduler:
            await scheduler.patch_settings({"mode": "off"}, "me", wait_s=0)
            for _ in range(6):
                await hear(scheduler, workers)
            assert (workers.live.mode, workers.live.watchdog_s) == ("off", 10 + changes)
            assert value(await scheduler.settings("one"), "mode") == ("off", "revision 1")
            assert workers.live_revision == (await scheduler.status())["desired_revision"] == changes + 1

    run(body)
