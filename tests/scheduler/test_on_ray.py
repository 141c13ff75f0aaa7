"""Scheduler, agents and clients on a real Ray: what is told arrives, and whatever dies, serving and settings stay."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from llep.errors import RevisionConflict, SchedulerUnreachable, SettingsError, UnknownEngine
from llep.messages import RecordingOrder, decode_snapshot
from llep.scheduler.client import SchedulerClient
from llep.scheduler.store import FILE
from llep.shapes import ModelShape
from llep.spool import spool_dir
from llep.traces import Trace, unpacked
from llep.vllm_plugin.recording import Recorder
from tests.scheduler.conftest import RayHead, RunningEngine, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MakeEngine = Callable[..., RunningEngine]
COME_BACK_S = 120.0  # others may need the cores too


class Control:
    """A SchedulerClient in an event loop of its own, as in the control plane, called from the test's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()
        self.client = SchedulerClient()
        self._run(self.client.__aenter__())

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.client.call(method, *args, **kwargs))

    def answers(self) -> bool:
        try:
            self.call("status")
        except SchedulerUnreachable:
            return False
        return True

    def live_view(self, engine: str) -> dict[str, Any] | None:
        """The engine's view if it can be had and all its ranks are fresh."""
        try:
            views = self.call("engines")
        except SchedulerUnreachable:
            return None
        return next((v for v in views if v["id"] == engine and v["state"] == "live"), None)

    def loads_of(self, engine: str, window_s: float = 2.0) -> dict[str, Any] | None:
        """Its loads once there are some."""
        (loads,) = self.call("loads", window_s, engine)
        return loads if loads["layer_steps"] else None

    def kill_actor(self) -> int:
        pid = int(self.call("status")["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        self._run(self.client.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(60)


@pytest.fixture(scope="module")
def control(ray_head: RayHead) -> Iterator[Control]:
    control = Control()
    try:
        wait_for(control.answers)
        yield control
    finally:
        control.close()


def test_reports_come_in_and_loads_go_out(control: Control, make_engine: MakeEngine) -> None:
    make_engine("loads")
    view = wait_for(lambda: control.live_view("loads"))
    assert (view["model_name"], view["ep_size"], len(view["ranks"]), view["mode"]) == ("org/tiny", 2, 2, "active")
    loads = wait_for(lambda: control.loads_of("loads"))
    assert loads["imbalance_ratio_before"] == pytest.approx(1.8, abs=0.1)
    assert loads["imbalance_ratio_after"] == pytest.approx(1.0, abs=0.05)
    assert sum(r["routed_tokens"] for r in loads["ranks"]) == sum(r["computed_tokens"] for r in loads["ranks"])
    snapshot = decode_snapshot(control.call("metrics"))
    (engine,) = [e for e in snapshot.engines if e.engine == "loads"]
    assert [rank.rank for rank in engine.ranks] == [0, 1] and engine.refused == {}


def test_a_change_reaches_the_workers(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("change")
    before = wait_for(lambda: control.live_view("change"))
    change = control.call("patch_settings", {"imbalance_threshold": 7.5}, "me", "to try", engines=["change"])
    assert [(a["engine"], a["state"], a["revision"]) for a in change["applied"]] == [
        ("change", "live", change["revision"])
    ]
    assert engine.status()["settings"]["imbalance_threshold"] == 7.5
    view = control.live_view("change")
    assert view["live_revision"] == view["desired_revision"] == change["revision"] > before["live_revision"]
    settings = {s["key"]: s for s in control.call("settings", "change")["settings"]}
    assert settings["imbalance_threshold"]["value"] == 7.5
    assert settings["imbalance_threshold"]["source"] == f"revision {change['revision']}"


def test_errors_come_through_as_they_are(control: Control, make_engine: MakeEngine) -> None:
    with pytest.raises(SettingsError, match="did you mean 'imbalance_threshold'") as error:
        control.call("patch_settings", {"imbalance_treshold": 2}, "me")
    assert error.value.param == "imbalance_treshold"
    with pytest.raises(UnknownEngine, match="no engine named 'ghost'"):
        control.call("settings", "ghost")
    with pytest.raises(RevisionConflict, match="not 99999"):
        control.call("patch_settings", {"mode": "off"}, "me", if_revision=99999)


def test_a_mode_goes_back_by_itself_also_when_the_actor_dies(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("ttl")
    wait_for(lambda: control.live_view("ttl"))
    change = control.call("set_mode", "observe", 6.0, "me", engines=["ttl"])
    assert [a["state"] for a in change["applied"]] == ["live"] and engine.status()["mode"] == "observe"
    control.kill_actor()
    assert engine.status()["mode"] == "observe"
    wait_for(lambda: engine.status()["mode"] == "active", 20)
    assert time.time() >= change["reverts_at_s"]


def test_the_actor_killed_comes_back_with_its_settings(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("actor")
    wait_for(lambda: control.live_view("actor"))
    change = control.call("patch_settings", {"watchdog_s": 33}, "me", engines=["actor"])
    pid = control.kill_actor()
    view = wait_for(lambda: control.live_view("actor"))
    assert view["live_revision"] == change["revision"] and control.call("status")["pid"] != pid
    assert wait_for(lambda: control.loads_of("actor"))["imbalance_ratio_before"] > 1.5
    control.call("patch_settings", {"watchdog_s": 34}, "me", engines=["actor"])
    wait_for(lambda: engine.status()["settings"]["watchdog_s"] == 34)
    assert "SchedulerUnreachable" not in engine.agent_log() and "Traceback" not in engine.agent_log()


def test_the_agent_killed_is_replaced_and_late_directives_arrive(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("agent")
    wait_for(lambda: control.live_view("agent"))
    engine.kill_agent()
    change = control.call("patch_settings", {"watchdog_s": 44}, "me", engines=["agent"], wait_s=0.5)
    assert [a["state"] for a in change["applied"]] == ["sent"]
    assert engine.goes_on() and engine.status()["settings"]["watchdog_s"] == 60
    engine.start_agent()
    wait_for(lambda: engine.status()["settings"]["watchdog_s"] == 44, COME_BACK_S)
    wait_for(lambda: (control.live_view("agent") or {}).get("live_revision") == change["revision"], COME_BACK_S)


def test_an_engine_that_reports_seldom_is_found_at_once(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("seldom", report_interval_s=300.0)
    wait_for(lambda: control.live_view("seldom"))
    control.kill_actor()
    wait_for(lambda: control.live_view("seldom"), COME_BACK_S)
    engine.kill_agent()
    engine.start_agent()
    change = control.call("patch_settings", {"watchdog_s": 55}, "me", engines=["seldom"], wait_s=20)
    assert change["applied"][0]["state"] in ("live", "held")
    wait_for(lambda: engine.status()["settings"]["watchdog_s"] == 55)


def test_a_restarted_engine_gets_the_settings_that_hold(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("restart")
    wait_for(lambda: control.live_view("restart"))
    control.call("patch_settings", {"watchdog_s": 66}, "me", engines=["restart"])
    engine.end()
    engine.start["min_batch_tokens"] = 11
    engine.start_agent()
    engine.start_workers()
    settings = wait_for(lambda: engine.status()["revision"] and engine.status()["settings"])
    assert (settings["watchdog_s"], settings["min_batch_tokens"]) == (66, 11)
    events = [(e["kind"], e["engine"]) for e in control.call("events", 20)]
    assert ("engine_restarted", "restart") in events


def test_a_recording_arrives_whoever_is_killed_on_the_way(control: Control, make_engine: MakeEngine) -> None:
    engine = make_engine("recorded")
    wait_for(lambda: control.live_view("recorded"))
    id = control.call("recording_start", "recorded", "me", steps=40)["id"]
    shape = ModelShape(name="recorded", layer_numbers=(0, 1), num_experts=256, top_k=8)
    recorder = Recorder(spool_dir(""), "recorded", "life", shape, 8)
    recorder.follow(RecordingOrder(id, time.time() + 600, 40, 0), 64 << 20)
    rng = np.random.default_rng(0)
    written = rng.integers(0, 1 << 20, (40, 2, 8, 256))
    for step in range(20):
        for layer in range(2):
            recorder.add(step, "prefill", layer, written[step, layer])
    wait_for(lambda: control.call("recording", id)["bytes"], COME_BACK_S)
    engine.kill_agent()
    for step in range(20, 40):
        for layer in range(2):
            recorder.add(step, "prefill", layer, written[step, layer])
    assert engine.goes_on()
    control.kill_actor()
    engine.start_agent()

    def ended() -> Any:
        with suppress(SchedulerUnreachable):
            return (view := control.call("recording", id))["ended_s"] and view

    view = wait_for(ended, COME_BACK_S)
    assert (view["state"], view["steps"], view["problem"]) == ("done", 40, "")
    data = b""
    while chunk := control.call("recording_read", id, len(data), 1 << 20):
        data += chunk
    assert len(data) == view["data_bytes"]
    tar = engine.folder / "recorded.tar"
    tar.write_bytes(data)
    with unpacked(tar) as folder:
        steps = list(Trace(folder).steps())
    assert len(steps) == 40 and all((step.counts_LRE == written[step.step]).all() for step in steps)
    wait_for(lambda: not list(spool_dir("").iterdir()))


def test_the_bridge_killed_is_replaced(control: Control) -> None:
    bridge = control.client._bridge
    assert bridge is not None and bridge._process is not None
    os.kill(bridge._process.pid, signal.SIGKILL)
    wait_for(control.answers)
    assert control.client._bridge is not bridge


def test_a_damaged_store_is_set_aside_and_settings_stay(
    control: Control, make_engine: MakeEngine, short_folder: Path
) -> None:
    engine = make_engine("damage")
    wait_for(lambda: control.live_view("damage"))
    change = control.call("patch_settings", {"watchdog_s": 77}, "me", engines=["damage"])
    pid = control.kill_actor()
    for path in (short_folder / "state").glob(f"{FILE}*"):
        path.write_bytes(b"broken" * 1000)
    wait_for(lambda: control.answers() and control.call("status")["pid"] != pid)
    kinds = {e["kind"] for e in control.call("events", 100)}
    assert "store_set_aside" in kinds
    view = wait_for(lambda: (v := control.live_view("damage")) and v["live_revision"] > change["revision"] and v)
    assert view["desired_revision"] == view["live_revision"]
    assert engine.status()["settings"]["watchdog_s"] == 77


def test_all_of_ray_killed_serving_goes_on_and_all_comes_back(
    control: Control, make_engine: MakeEngine, ray_head: RayHead, short_folder: Path
) -> None:
    engine = make_engine("ray")
    wait_for(lambda: control.live_view("ray"))
    change = control.call("patch_settings", {"watchdog_s": 88}, "me", engines=["ray"])
    ray_head.kill()
    wait_for(lambda: not control.answers())
    started_s = time.monotonic()
    with pytest.raises(SchedulerUnreachable, match=f"{ray_head.address}.*Start Ray there with `ray start --head`"):
        control.call("engines")
    assert time.monotonic() - started_s < 5
    assert engine.goes_on() and engine.status()["settings"]["watchdog_s"] == 88
    wait_for(lambda: "the Ray that was joined has ended" in engine.agent_log())
    wait_for(lambda: "nothing listens there" in engine.agent_log())
    ray_head.start()
    view = wait_for(lambda: control.live_view("ray"), COME_BACK_S)
    assert view["live_revision"] == change["revision"]
    wait_for(lambda: control.loads_of("ray"), COME_BACK_S)
    assert engine.agent is not None and engine.agent.poll() is None
    with sqlite3.connect(short_folder / "state" / FILE) as db:
        rows = db.execute("SELECT number FROM revisions ORDER BY number").fetchall()
    db.close()
    assert (change["revision"],) in rows
    change = control.call("patch_settings", {"watchdog_s": 89}, "me", engines=["ray"])
    assert [a["state"] for a in change["applied"]] == ["live"]
    assert engine.agent_log().count("WARNING") < 8 and "Traceback" not in engine.agent_log()
