"""What the scheduler changes by itself: revisions by llep with a reason; what people change wins."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llep.config import Settings
from llep.scheduler.actor import Scheduler
from llep.scheduler.decide_placement import decide_placement
from llep.scheduler.steering import HELD_FOR_PEOPLE_S
from llep.scheduler.store import FILE
from llep.scheduler.windows import Engine
from llep.views import EventKind
from tests.scheduler.peer import Workers
from tests.scheduler.test_actor import hear, run, scheduler_in, value
from tests.unit.test_decide import evidence, worth

SLOW = evidence(worth_NPW=worth(-0.1))


async def setting(scheduler: Scheduler, key: str) -> tuple[Any, str]:
    return value(await scheduler.settings("one"), key)


def test_the_brake_is_a_change_for_a_time_that_ends_when_a_person_says_otherwise(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            engine = scheduler._engine("one")
            scheduler._steer_brake(engine, evidence())
            assert (await scheduler.status())["desired_revision"] == 0
            for _ in range(3):
                scheduler._steer_brake(engine, SLOW)
            assert await setting(scheduler, "imbalance_threshold") == (1.45, "revision 1")
            (made,) = await scheduler.revisions()
            assert made["author"] == "llep" and "slower" in made["reason"] and made["engines"] == ["one"]
            assert made["diff"] == {"imbalance_threshold": [1.3, 1.45]}
            (event,) = await scheduler.events(1)
            assert (event["kind"], event["author"], event["engine"]) == ("brake", "llep", "one")
            decided = {d["outcome"]: d for d in await scheduler.decisions("one")}
            assert decided["brake"]["revision"] == 1 and decided["brake"]["inputs"]["strikes"] == 1
            assert decided["braking"]["revision"] is None
        async with scheduler_in(tmp_path) as scheduler:  # it is remembered
            await hear(scheduler, Workers("one"))
            engine = scheduler._engine("one")
            assert scheduler._brake("one").strikes == 1
            scheduler._steer_brake(engine, SLOW)
            assert (await scheduler.status())["desired_revision"] == 1
            await scheduler.patch_settings({"imbalance_threshold": 1.2}, "me", wait_s=0)
            assert await setting(scheduler, "imbalance_threshold") == (1.2, "revision 2")
            scheduler._steer_brake(engine, evidence())
            assert scheduler._brake("one").strikes == 0
            await scheduler.set_mode("active", 600.0, "me", wait_s=0)
            scheduler._brakes["one"] = type(scheduler._brake("one"))(1, 0.0, 0.0)
            scheduler._brake_revisions["one"] = 3
            scheduler._steer_brake(engine, SLOW)  # would set the mode, which a person has set for a time
            assert await setting(scheduler, "mode") == ("active", "revision 3")

    run(body)


def test_auto_tune_sets_what_no_person_has_set_and_only_if_it_may(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one", min_batch_tokens=100))
            engine = scheduler._engine("one")
            await scheduler.patch_settings({"min_chunk_tokens": 512}, "me", wait_s=0)
            dear: dict[str, Any] = {"phase_seconds": {"plan": 1.0, "lend": 200.0, "compute": 50.0}}
            off = Settings(min_batch_tokens=100, min_chunk_tokens=512)
            on = off.changed({"auto_tune": True})
            scheduler._steer_thresholds(engine, evidence(settings=off, **dear))
            assert (await scheduler.status())["desired_revision"] == 1
            for _ in range(2):  # the second comes too soon
                scheduler._steer_thresholds(engine, evidence(settings=on, **dear))
            (made,) = await scheduler.revisions(1)
            assert (made["number"], made["author"]) == (2, "llep")
            assert set(made["patch"]) == {"imbalance_threshold", "min_batch_tokens"}
            assert await setting(scheduler, "min_chunk_tokens") == (512, "revision 1")
            assert 1.3 < (await setting(scheduler, "imbalance_threshold"))[0] <= off.auto_tune_max_threshold
            outcomes = [d["outcome"] for d in await scheduler.decisions("one")]
            assert outcomes == ["set", "propose"]  # what is said again is stored once
            await scheduler.rollback(1, "me", "no", wait_s=0)
            assert (await setting(scheduler, "imbalance_threshold"))[0] == 1.3

    run(body)


async def hot(scheduler: Scheduler) -> tuple[Workers, Engine]:
    """An engine that wants replicas, with two minutes of windows behind it."""
    workers = Workers("one", replicas="apply")
    workers.phase_lend_s = 0.5
    now_s = time.monotonic()
    for number in range(12):
        for _ in range(20):
            workers.step()
        for report in workers.reports():
            scheduler._windows.take(report, now_s - 120.0 + 10.0 * number)
    await hear(scheduler, workers)
    return workers, scheduler._engine("one")


def test_experts_that_stay_hot_are_ordered_by_itself_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers, engine = await hot(scheduler)
            decisions = []
            for _ in range(2):
                await scheduler._steer_placement(engine)
                await hear(scheduler, workers)
                decisions = await scheduler.decisions("one", limit=5)
            placed = [d for d in decisions if d["kind"] == "placement"]
            assert [d["outcome"] for d in placed][-1] == "order", placed
            assert placed[-1]["revision"] == 1 and placed[-1]["expected_gain_ratio"] > 0
            (view,) = await scheduler.placement("one")
            assert view["replicas"] and {copy["rank"] for copy in view["replicas"]} == {1}
            assert np.sum(view["used_slots"]) == len(view["replicas"]) <= 4
            (made,) = await scheduler.revisions()
            assert made["author"] == "llep" and made["patch"]["placement"]["added"] == len(view["replicas"])

    run(body)


def test_a_placement_that_a_person_went_back_to_is_left_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers, engine = await hot(scheduler)
            await scheduler._steer_placement(engine)
            for _ in range(2):
                await hear(scheduler, workers)
            await scheduler.placement_rollback("one", "me", "it made things worse")
            for _ in range(2):
                await hear(scheduler, workers)
            engine.placed_s -= 60.0
            await scheduler._steer_placement(engine)
            assert [made["author"] for made in await scheduler.revisions()] == ["me", "llep"]
            (held,) = await scheduler.decisions("one", limit=1)
            assert held["outcome"] == "held" and "me ordered placement 2" in held["reason"]
            scheduler._journal._store._db.execute("UPDATE placements SET time_s = time_s - ?", (HELD_FOR_PEOPLE_S,))
            await scheduler._steer_placement(engine)
            assert [made["author"] for made in await scheduler.revisions()] == ["llep", "me", "llep"]

    run(body)


def test_what_a_person_changes_while_a_placement_is_planned_wins(tmp_path: Path, monkeypatch) -> None:
    is_planning, may_go_on = threading.Event(), threading.Event()

    def slow(ground: Any, *, is_filling: bool) -> Any:
        is_planning.set()
        assert may_go_on.wait(30)
        return decide_placement(ground, is_filling=is_filling)

    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            _, engine = await hot(scheduler)
            monkeypatch.setattr("llep.scheduler.steering.decide_placement", slow)
            planning = asyncio.create_task(scheduler._steer_placement(engine))
            await asyncio.to_thread(is_planning.wait, 30)
            await scheduler.patch_settings({"replicas": "suggest"}, "me", wait_s=0)
            may_go_on.set()
            await planning
            assert [made["author"] for made in await scheduler.revisions()] == ["me"]

    run(body)


def test_the_brake_forgets_for_a_change_of_settings_by_people_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            engine = scheduler._engine("one")
            scheduler._steer_brake(engine, SLOW)
            scheduler._brakes["one"] = replace(scheduler._brake("one"), strikes=7)
            await scheduler.recording_start("one", "me", duration_s=5.0)
            scheduler._steer_brake(engine, SLOW)
            assert scheduler._brake("one").strikes == 7
            await scheduler.patch_settings({"imbalance_threshold": 1.2}, "me", wait_s=0)
            scheduler._order(engine, ((0, 0, 1),), "llep", "after the change by a person")
            scheduler._steer_brake(engine, evidence())
            assert scheduler._brake("one").strikes == 0

    run(body)


def test_a_lost_store_makes_no_setting_of_people_llep_s_own(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one", min_batch_tokens=100))
            await scheduler.patch_settings({"auto_tune": True, "min_chunk_tokens": 512}, "me", wait_s=0)
            (tmp_path / FILE).unlink()
            scheduler._journal.note(EventKind.ENGINE_UP, "said", engine="one", data={})
            assert (await scheduler.revisions(1))[0]["reason"].startswith("revision 1 is written again")
            on = Settings(min_batch_tokens=100, min_chunk_tokens=512, auto_tune=True)
            dear = {"plan": 1.0, "lend": 200.0, "compute": 50.0}
            scheduler._steer_thresholds(scheduler._engine("one"), evidence(settings=on, phase_seconds=dear))
            (made,) = await scheduler.revisions(1)
            assert made["author"] == "llep" and "min_chunk_tokens" not in made["patch"]

    run(body)
