"""While changes flow, with a real Ray: the scheduler's actor, then all of Ray, are killed and come back."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect
from reporting import Engine
from test_with_ray import RayHead, http, ray_head, report, wait_until

from llep.errors import LlepError
from llep.scheduler.client import SchedulerClient

from .browsing import Visit

pytestmark = pytest.mark.ray
__all__ = ["http", "ray_head"]  # fixtures

SOON_MS = 120_000  # others may need the cores too
SOON_S = SOON_MS / 1000


@pytest.fixture
def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "RAY_"))}


class Changes:
    """One change after the other. acknowledged: revision -> its reason and value."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.acknowledged: dict[int, tuple[str, float]] = {}
        self.refused: set[str] = set()

    def run(self, over: threading.Event) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60) as client:
            for number in itertools.count():
                if over.wait(0.05):
                    return
                reason, value = f"change {number}", 1 + number % 3000 / 1000
                answer = client.patch("/v1/settings", params={"reason": reason}, json={"capacity_factor": value})
                if answer.status_code == 200:
                    self.acknowledged[answer.json()["revision"]] = (reason, value)
                else:
                    self.refused.add(answer.json()["error"]["code"])

    def go_on(self) -> None:
        """Until some more are acknowledged."""
        wanted = len(self.acknowledged) + 5
        wait_until(lambda: len(self.acknowledged) >= wanted, SOON_S)


def keep_reporting(address: str, state_dir: Path, over: threading.Event) -> None:
    """As an agent does, whatever becomes of Ray."""

    async def run() -> None:
        engine = Engine()
        async with SchedulerClient(address, "llep", state_dir) as client:
            while not over.is_set():
                try:
                    await report(client, engine)
                except LlepError:
                    pass
                engine.run(tokens=256)
                await asyncio.sleep(0.3)

    asyncio.run(run())


@contextmanager
def in_threads(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    over = threading.Event()
    threads = [threading.Thread(target=work, args=(over,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(timeout=90)


def revisions(client: httpx.Client) -> dict[int, dict[str, Any]]:
    found, query = {}, {"limit": 500}
    while True:
        page = client.get("/v1/settings/revisions", params=query).raise_for_status().json()
        found |= {revision["number"]: revision for revision in page["data"]}
        if not page["has_more"]:
            return found
        query["cursor"] = page["next_cursor"]


def test_nothing_acknowledged_is_lost_and_the_page_says_what_is_away(
    http: httpx.Client, ray_head: RayHead, tmp_path: Path, visit: Visit
) -> None:
    wait_until(lambda: http.get("/v1/settings").status_code == 200, SOON_S)
    changes = Changes(str(http.base_url))
    with in_threads(changes.run, lambda over: keep_reporting(ray_head.address, tmp_path / "state", over)):
        page = visit(str(http.base_url), refusals=True)
        link, alert = page.locator("#link-text"), page.get_by_role("alert")
        expect(link).to_have_text("live", timeout=SOON_MS)
        changes.go_on()

        (started,) = http.get("/v1/events?kind=scheduler_started&limit=1").json()["data"]
        os.kill(started["data"]["pid"], signal.SIGKILL)
        changes.go_on()
        expect(link).to_have_text("live", timeout=SOON_MS)

        ray_head.kill()
        expect(alert).to_contain_text("The scheduler is away.", timeout=SOON_MS)
        expect(alert).to_contain_text("Serving goes on with its last settings")
        expect(page.locator("html")).to_have_attribute("data-old", "all")
        expect(link).to_contain_text("no answer for")
        assert http.get("/v1/engines").json()["error"]["code"] == "scheduler_unreachable"
        assert http.get("/readyz").status_code == 503 and http.get("/livez").status_code == 200
        time.sleep(2)  # changes are refused meanwhile

        ray_head.start()
        changes.go_on()
        expect(alert).to_have_count(0, timeout=SOON_MS)
        expect(link).to_have_text("live", timeout=SOON_MS)
        expect(page.locator("html")).to_have_attribute("data-old", "nothing")
    stored = revisions(http)
    kept = {number: (stored[number]["reason"], stored[number]["patch"]) for number in changes.acknowledged}
    assert kept == {
        number: (reason, {"capacity_factor": value}) for number, (reason, value) in changes.acknowledged.items()
    }
    assert changes.refused <= {"scheduler_unreachable"} and changes.refused
    kinds = [event["kind"] for event in http.get("/v1/events?kind=scheduler_started").json()["data"]]
    assert len(kinds) == 3
