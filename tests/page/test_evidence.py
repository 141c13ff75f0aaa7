"""Plans, placements and recordings: what the scheduler keeps beyond the live loads, looked at and acted on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Route, expect
from recorded import recorded
from reporting import Engine
from running import Running

from .browsing import Traffic, Visit


def test_a_sampled_plan_opens_with_its_ranks_and_lends(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/decisions?engine=large")
    first = page.locator("#plans tbody tr").first
    expect(first).to_contain_text("lend")
    first.get_by_role("button").click()
    detail = page.locator("#plan")
    expect(detail.get_by_role("heading", name=re.compile("^Step .* lend$"))).to_be_focused()
    expect(detail.locator("tbody tr")).to_have_count(4)
    expect(detail).to_contain_text(re.compile(r"expert \d+: rank 0 → rank \d, [\d.]+k? pairs"))
    detail.get_by_role("button", name="Close").click()
    expect(detail).to_be_hidden()


def test_advice_and_decisions_come_with_their_reasons(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/decisions?engine=tiny")
    expect(page.locator("#advice .advice h3")).to_have_text(re.compile("Worth it|Not worth it|Not enough evidence yet"))
    expect(page.locator("#decisions tbody tr").first).to_contain_text("advice")
    page.locator("#decisions summary").first.click()
    expect(page.locator("#decisions details[open] pre")).to_be_visible()


def test_a_placement_is_applied_and_rolled_back(running: Running, visit: Visit, report: Callable[..., Traffic]) -> None:
    report(running, Engine())
    running.http.patch("/v1/settings", json={"replicas": "suggest"}).raise_for_status()
    page = visit(f"{running.url}/#/placement", refusals=True)
    expect(page.locator("#placement-tiles")).to_contain_text("home ranks only")
    expect(page.locator("#placement-tiles")).to_contain_text("0 of 4")
    page.get_by_role("button", name="Ask for a suggestion").click()
    expect(page.locator("#suggestion h3")).to_be_visible()
    expect(page.get_by_role("button", name="Apply", exact=True)).to_be_disabled()

    copy = {"layer": 2, "expert": 0, "rank": 1, "share": 0.4}

    def suggest_it(route: Route) -> None:  # minutes of loads would have to speak for it
        answer = route.fetch().json()
        route.fulfill(body=json.dumps({**answer, "replicas": [copy], "added": [copy], "move_bytes": 3_000_000}))

    page.route("**/v1/placement/suggest*", suggest_it)
    page.get_by_role("button", name="Ask for a suggestion").click()
    expect(page.locator("#suggestion")).to_contain_text("1 more, 0 fewer")
    page.locator("#placement-reason").fill("hot all day")
    page.get_by_role("button", name="Apply", exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The scheduler would not do it")
    dialog.get_by_role("button", name="Apply").click()
    expect(page.locator("#placement-outcome")).to_contain_text("Ordered with revision 2")
    expect(page.locator("#placement-tiles")).to_contain_text("live")
    expect(page.locator("#replicas tbody tr")).to_have_text(re.compile(r"^2\s*0\s*1"))
    expect(page.locator("#slots canvas")).to_have_attribute("aria-label", re.compile("2 ranks"))

    page.get_by_role("button", name="Roll back").click()
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.locator("#placement-outcome")).to_contain_text("no resident replicas")
    expect(page.locator("#placement-tiles")).to_contain_text("home ranks only")


def test_an_engine_without_room_for_replicas_says_so(
    running: Running, visit: Visit, report: Callable[..., Traffic]
) -> None:
    report(running, Engine(replica_slots_per_rank=0, start={"replicas": "suggest"}))
    page = visit(f"{running.url}/#/placement")
    expect(page.locator("#suggest-problem")).to_contain_text("replica_slots_per_rank is 0")
    page.get_by_role("button", name="Ask for a suggestion").click()
    expect(page.locator("#suggestion h3")).to_have_text("No room")
    expect(page.locator("#suggestion")).to_contain_text(re.compile("With room it would|slots would bring nothing"))
    expect(page.get_by_role("button", name="Apply", exact=True)).to_be_disabled()


def test_a_recording_is_started_and_stopped(running: Running, visit: Visit, report: Callable[..., Traffic]) -> None:
    report(running, Engine())
    page = visit(f"{running.url}/#/recordings", refusals=True)
    expect(page.locator("#recordings")).to_contain_text("No recording yet")
    page.locator("#record-reason").fill("evening peak")
    page.get_by_role("button", name="Start recording").click()
    row = page.locator("#recordings tbody tr")
    expect(row).to_contain_text("evening peak")
    row.get_by_role("button", name="Stop").click()
    expect(page.locator("#record-outcome")).to_have_attribute("data-tone", re.compile("good|bad"))


def test_a_recording_is_downloaded_tuned_with_and_deleted(running: Running, visit: Visit, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made", steps=8)
    page = visit(f"{running.url}/#/recordings")
    row = page.locator("#recordings tbody tr")
    with page.expect_download() as download:
        row.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == f"{id}.tar"
    assert download.value.path().stat().st_size > 1000

    row.get_by_role("button", name="Tune").click()
    operation = page.locator("#operations .advice")
    expect(operation).to_contain_text(re.compile(f"{id}: (waiting|running|done)"))
    operation.get_by_role("button").first.click()  # tuning to its end: tests/server
    expect(page.locator("#operation-outcome")).to_contain_text(re.compile("is (cancelled|forgotten)"))

    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#record-outcome")).to_contain_text("is deleted")


def test_what_tuning_found_is_looked_at_and_applied(
    running: Running, visit: Visit, report: Callable[..., Traffic], tmp_path: Path
) -> None:
    engine = Engine()
    recorded(running, tmp_path / "made", engine=engine)
    report(running, engine, Engine(name="another"))
    running.http.patch("/v1/settings", json={"imbalance_threshold": 50}).raise_for_status()  # which leaves all alone
    page = visit(f"{running.url}/#/recordings?engine=another")
    page.locator("#tuning-costs").select_option("")
    page.locator("#recordings tbody tr").get_by_role("button", name="Tune").click()
    card = page.locator("#operations .advice")
    expect(card).to_contain_text("Worth it: the load of the most loaded rank falls by", timeout=300_000)
    expect(card.locator("code")).to_contain_text("imbalance_threshold=")
    card.get_by_role("button", name="Look at it in Settings").click()
    outcome = page.locator("#settings-outcome")
    expect(outcome).to_contain_text("Dry run: nothing has changed yet. On tiny:")
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(outcome).to_contain_text("is live on tiny since step")
    expect(page.locator("#revisions tbody tr").first).to_contain_text(
        re.compile("imbalance_threshold: 50 → .*found by")
    )
    for name, is_changed in (("tiny", True), ("another", False)):
        held = running.http.get("/v1/settings", params={"engine": name}).json()["settings"]
        (value,) = (one["value"] for one in held if one["key"] == "imbalance_threshold")
        assert (value < 3) is is_changed, name
