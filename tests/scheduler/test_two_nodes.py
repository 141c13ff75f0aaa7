"""One Ray cluster over two nodes: the scheduler runs on the one that keeps its state, wherever its agents are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llep.scheduler.client import SCHEDULER_RESOURCE
from tests.scheduler.conftest import RayHead, RayNode, RunningEngine, wait_for
from tests.scheduler.test_on_ray import COME_BACK_S, Control

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def keeper(ray_head: RayHead) -> Iterator[RayNode]:
    """The other node. Engines and clients join Ray on the head's, as far as they can tell."""
    node = RayNode(ray_head, {SCHEDULER_RESOURCE: 1})
    try:
        node.start()
        yield node
    finally:
        node.kill()


def test_the_actor_runs_where_its_state_is_and_comes_back_there(keeper: RayNode, short_folder: Path) -> None:
    engine = RunningEngine("far", short_folder, {"report_interval_s": 0.2}, has_own_agent=True)
    engine.start_workers()
    control = Control()
    try:
        wait_for(lambda: control.live_view("far"), COME_BACK_S)
        change = control.call("patch_settings", {"watchdog_s": 21}, "me", wait_s=10.0)
        assert [each["state"] for each in change["applied"]] == ["live"]
        assert keeper.has(control.call("status")["pid"])
        keeper.kill()
        wait_for(lambda: not control.answers(), COME_BACK_S)
        assert engine.goes_on() and engine.status()["settings"]["watchdog_s"] == 21
        keeper.start()
        view = wait_for(lambda: control.live_view("far"), COME_BACK_S)
        assert view["live_revision"] == change["revision"]
        assert keeper.has(control.call("status")["pid"])
    finally:
        engine.end()
        control.close()
