"""What the scheduler answers about loads, plans, placements and its own decisions, without Ray around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llep.errors import PlacementRefused, SettingsError, UnknownEngine, UnknownPlan
from llep.scheduler.store import FILE
from tests.scheduler.peer import Workers
from tests.scheduler.test_actor import hear, run, scheduler_in


def test_history_matrix_and_hot_experts_are_what_was_counted(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one", ep_size=2, num_layers=3)
            workers.counting_s = 5.0
            for _ in range(4):
                assert await hear(scheduler, workers) == []
            points = await scheduler.history("one", 60.0, 1.0)
            assert sum(point["tokens"] for point in points) == 400
            assert sum(point["layer_steps"] for point in points) == 12
            assert points[-1]["memory_used_R"] == [0, 1000] and points[-1]["memory_free_R"] == [8 << 30] * 2
            assert sum(point["phase_seconds"]["compute"] for point in points) == pytest.approx(
                4 * 0.0005,
                rel=0.2,  # rank 1 is a report behind when rank 0 speaks
            )
            assert points[-1]["measured_gain_s"] is None
            by_expert = await scheduler.matrix("one", "expert", window_s=60)
            assert by_expert["values"] == workers.routed_LE.tolist() and by_expert["layers"] == [0, 1, 2]
            before, after = [await scheduler.matrix("one", "rank", stage) for stage in ("before", "after")]
            assert before["values"] == workers.routed_LR.tolist() and after["values"] == workers.computed_LR.tolist()
            assert before["imbalance_ratio"][0] > 1.6 and after["imbalance_ratio"][0] < 1.1
            decode = await scheduler.matrix("one", "rank", phase="decode")
            assert not np.any(decode["values"]) and decode["imbalance_ratio"] == [None] * 3
            hottest = await scheduler.hot("one", limit=2)
            assert {expert["expert"] for expert in hottest} <= {0, 1}
            assert hottest[0]["load_ratio"] > 1.5 and hottest[0]["home_rank"] == 0
            assert hottest[0]["tokens"] == workers.routed_LE.max()
            (loads,) = await scheduler.loads(60, "one", "decode")
            assert loads["tokens"] == 0 and loads["imbalance_ratio_before"] is None and loads["decisions"] == {}
            prefill, decode = [await scheduler.history("one", 60.0, 1.0, phase) for phase in ("prefill", "decode")]
            assert [point["phase_seconds"] for point in prefill] == [point["phase_seconds"] for point in points]
            assert sum(point["lends"] for point in prefill) == workers.lends_R.sum()
            assert not any(point["lends"] or any(point["phase_seconds"].values()) for point in decode)
            for question in (
                scheduler.matrix("one", "expert", "after"),
                scheduler.matrix("one", "row"),
                scheduler.loads(60, None, "dream"),
                scheduler.history("one", 60, 0),
                scheduler.hot("one", 0),
            ):
                with pytest.raises(SettingsError):
                    await question
            with pytest.raises(UnknownEngine):
                await scheduler.history("ghost")

    run(body)


def test_sampled_plans_have_ids_that_grow_over_engines(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            one, two = Workers("one"), Workers("two")
            for _ in range(2):
                await hear(scheduler, one)
                await hear(scheduler, two)
            plans = await scheduler.plans()
            assert [plan["id"] for plan in plans] == sorted((plan["id"] for plan in plans), reverse=True)
            assert [plan["engine"] for plan in plans] == [*["two"] * 3, *["one"] * 3, *["two"] * 3, *["one"] * 3]
            older = await scheduler.plans("one", limit=2, before_id=plans[3]["id"])
            assert older == plans[4:6]
            assert await scheduler.plan("one", plans[3]["id"]) == plans[3]
            assert plans[0]["lends"] == [{"expert": 0, "src_rank": 0, "dst_rank": 1, "tokens": 10}]
            assert plans[0]["imbalance_ratio_before"] > 1.5 > plans[0]["imbalance_ratio_after"]
            with pytest.raises(UnknownPlan):
                await scheduler.plan("two", plans[3]["id"])

    run(body)


COPY = {"layer": 1, "expert": 0, "rank": 1}
REFUSED = {
    "unknown_layer": [{**COPY, "layer": 9}],
    "unknown_expert": [{**COPY, "expert": 4}],
    "unknown_rank": [(1, 0, 2)],
    "home_rank": [{**COPY, "rank": 0}],
    "twice": [COPY, COPY],
    "no_room": [(layer, expert, 1) for layer in range(3) for expert in (0, 1)],
    "garbled": [{"layer": 0}, "x"],
}


def test_a_placement_is_applied_shown_and_taken_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            await hear(scheduler, workers)
            with pytest.raises(PlacementRefused, match="off: replicas is off"):
                await scheduler.placement_apply("one", "me", replicas=[COPY])
            with pytest.raises(PlacementRefused, match="no_placement"):
                await scheduler.placement_rollback("one", "me")
            await scheduler.patch_settings({"replicas": "suggest"}, "me", wait_s=0)
            await hear(scheduler, workers)
            trial = await scheduler.placement_apply("one", "me", replicas=[COPY], dry_run=True)
            assert trial["used_slots"] == [0, 1] and trial["number"] == 0
            ordered = await scheduler.placement_apply("one", "me", "to try", replicas=[COPY])
            assert (ordered["number"], ordered["state"], ordered["live_number"]) == (2, "ordered", 0)
            for _ in range(2):
                await hear(scheduler, workers)
            assert workers.placement is not None and workers.placement.replicas == ((1, 0, 1),)
            (view,) = await scheduler.placement("one")
            assert (view["state"], view["live_number"], view["filled"]) == ("live", 2, 1)
            assert view["replicas"][0] | {"share": None} == {**COPY, "share": None}
            assert view["replicas"][0]["share"] == pytest.approx(0.45, abs=0.1)
            hottest = await scheduler.hot("one", limit=12)
            assert {(e["layer"], e["expert"]) for e in hottest if e["replica_ranks"] == [1]} == {(1, 0)}
            for rule, wrong in REFUSED.items():
                with pytest.raises(PlacementRefused, match=f"^{rule}: "):
                    await scheduler.placement_apply("one", "me", replicas=wrong)
            counted = (await scheduler.status())["orders_refused"]
            assert counted == {**dict.fromkeys(REFUSED, 1), "off": 1, "no_placement": 1}
            back = await scheduler.placement_rollback("one", "you")
            assert back["number"] == 0 and back["replicas"] == []
            for _ in range(2):
                await hear(scheduler, workers)
            assert workers.placement is None and workers.live_revision == 3
            again = await scheduler.placement_rollback("one", "you")
            assert again["number"] == 4 and len(again["replicas"]) == 1
            events = [(e["kind"], e["author"]) for e in await scheduler.events(3)]
            assert events == [("placement", "you"), ("placement", "you"), ("placement", "me")]
        async with scheduler_in(tmp_path) as scheduler:  # it lasts
            await hear(scheduler, workers)
            assert workers.held_revision == 4 and workers._held_placement is not None

    run(body)


def test_a_placement_that_no_longer_fits_a_restarted_engine_is_dropped(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            await scheduler.patch_settings({"replicas": "suggest"}, "me", wait_s=0)
            await scheduler.placement_apply("one", "me", replicas=[{"layer": 2, "expert": 0, "rank": 1}])
            smaller = Workers("one", num_layers=2)
            for _ in range(2):
                await hear(scheduler, smaller)
            assert smaller.placement is None and smaller.live_revision == 2
            await scheduler._steer(scheduler._engine("one"))
            (event,) = await scheduler.events(1)
            assert event["kind"] == "placement" and "unknown_layer" in event["message"]
            assert (await scheduler.placement("one"))[0]["number"] == 0
            assert (await scheduler.status())["orders_refused"] == {"unknown_layer": 1}

    run(body)


def test_replicas_switched_off_take_the_placement_away(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            await hear(scheduler, workers)
            await scheduler.patch_settings({"replicas": "suggest"}, "me", wait_s=0)
            await scheduler.placement_apply("one", "me", replicas=[COPY])
            await scheduler.patch_settings({"replicas": "off"}, "me", wait_s=0)
            for _ in range(2):
                await hear(scheduler, workers)
            await scheduler._steer(scheduler._engine("one"))
            (view,) = await scheduler.placement("one")
            assert view["state"] == "none" and view["replicas"] == []
            (newest,) = await scheduler.revisions(1)
            assert (newest["author"], newest["reason"]) == ("llep", "replicas is off")

    run(body)


def test_advice_and_decisions_say_what_they_rest_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            workers = Workers("one")
            await hear(scheduler, workers)
            (advice,) = await scheduler.advice()
            assert advice["verdict"] == "not_enough_evidence" and "say too little" in advice["reason"]
            assert advice["numbers"]["layer_steps"] == 0
            for _ in range(2):
                await scheduler._steer(scheduler._engine("one"))
            kinds = {(d["kind"], d["outcome"]) for d in await scheduler.decisions("one")}
            assert kinds == {
                ("brake", "not_enough_evidence"),
                ("thresholds", "not_enough_evidence"),
                ("advice", "not_enough_evidence"),
            }
            assert await scheduler.decisions("two") == []
            newest = await scheduler.decisions(limit=1)
            assert len(await scheduler.decisions(before_id=newest[0]["id"])) == 2
            assert (tmp_path / FILE).exists()

    run(body)
