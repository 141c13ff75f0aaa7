"""Settings, mode and recordings changed from the page, end to end, as a person does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from reporting import Engine
from running import Running

from .browsing import Traffic, Visit


@pytest.fixture
def settings_page(running: Running, visit: Visit, report: Callable[..., Traffic]) -> Iterator[Page]:
    report(running, Engine())
    page = visit(f"{running.url}/#/settings", refusals=True)
    expect(page.locator("#set-imbalance_threshold")).to_have_value("1.3")
    yield page


def value_of(running: Running, key: str) -> Any:
    view = running.http.get("/v1/settings", params={"engine": "tiny"}).json()
    return next(setting["value"] for setting in view["settings"] if setting["key"] == key)


def revision_of(running: Running) -> int:
    return int(running.http.get("/v1/settings").json()["revision"])


def test_dry_run_then_apply_then_roll_back(running: Running, settings_page: Page) -> None:
    page, outcome = settings_page, settings_page.locator("#settings-outcome")
    page.locator("#set-imbalance_threshold").fill("1.7")
    expect(page.locator("#change-count")).to_have_text("1 change")
    page.get_by_role("button", name="Check (dry run)").click()
    expect(outcome).to_contain_text("Dry run: nothing has changed yet")
    expect(outcome.locator("tbody tr")).to_have_text(re.compile(r"imbalance_threshold.*1\.3.*1\.7"))
    assert (value_of(running, "imbalance_threshold"), revision_of(running)) == (1.3, 0)

    page.locator("#settings-reason").fill("less lending")
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(outcome).to_contain_text("Revision 1 is live on tiny since step")
    assert (value_of(running, "imbalance_threshold"), revision_of(running)) == (1.7, 1)
    newest = page.locator("#revisions tbody tr").first
    expect(newest).to_contain_text("imbalance_threshold: 1.3 → 1.7")
    expect(newest).to_contain_text("less lending")
    expect(page.locator("#row-imbalance_threshold .source")).to_contain_text("revision 1")

    page.locator("#set-min_chunk_tokens").fill("64")
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(outcome).to_contain_text("Revision 2")
    page.get_by_role("button", name="Roll back to revision 1").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("min_chunk_tokens")
    dialog.get_by_role("button", name="Cancel").click()
    assert value_of(running, "min_chunk_tokens") == 64
    page.get_by_role("button", name="Roll back to revision 1").click()
    dialog.get_by_label("Reason").fill("not better")
    dialog.get_by_role("button", name="Roll back").click()
    expect(outcome).to_contain_text("Revision 3")
    assert (value_of(running, "imbalance_threshold"), value_of(running, "min_chunk_tokens")) == (1.7, 1)
    expect(page.locator("#revisions tbody tr").first).to_contain_text("not better")


def test_a_faster_change_of_somebody_else_is_not_overwritten(running: Running, settings_page: Page) -> None:
    page = settings_page
    page.locator("#set-imbalance_threshold").fill("1.7")
    read = running.http.get("/v1/settings", params={"engine": "tiny"}).text
    page.route("**/v1/settings?engine=*", lambda route: route.fulfill(body=read))  # the page has not noticed yet
    running.http.patch("/v1/settings", json={"imbalance_threshold": 2.0}).raise_for_status()
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(page.locator("#settings-outcome")).to_contain_text("check once more")
    assert value_of(running, "imbalance_threshold") == 2.0


def test_what_is_not_valid_can_not_be_sent(settings_page: Page) -> None:
    page = settings_page
    page.locator("#set-capacity_factor").fill("9")
    expect(page.locator("#change-count")).to_have_text("1 change, not valid yet")
    expect(page.get_by_role("button", name="Apply", exact=True)).to_be_disabled()
    page.locator("#set-capacity_factor").fill("1")
    page.locator("#set-layers").fill("three")
    page.get_by_role("button", name="Check (dry run)").click()
    expect(page.locator("#settings-outcome")).to_contain_text("layers")
    expect(page.locator("#settings-outcome")).to_have_attribute("data-tone", "bad")
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#change-count")).to_have_text("Nothing changed")


def test_a_reset_puts_a_key_back_to_what_it_was_at_start(running: Running, settings_page: Page) -> None:
    page = settings_page
    running.http.patch("/v1/settings", json={"imbalance_threshold": 2.0}).raise_for_status()
    page.locator("#row-imbalance_threshold").get_by_role("button", name="reset").click()
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(page.locator("#settings-outcome")).to_contain_text("Revision 2")
    assert value_of(running, "imbalance_threshold") == 1.3


def test_a_trial_in_shadow_is_kept_or_taken_back(running: Running, settings_page: Page) -> None:
    page = settings_page
    for button, kept in (("Roll back", False), ("Keep and make active", True)):
        page.locator("#set-imbalance_threshold").fill("1.1")
        page.get_by_role("button", name="Try in shadow").click()
        expect(page.locator("#trial-text")).to_contain_text("imbalance_threshold=1.1")
        assert value_of(running, "mode") == "shadow"
        page.locator("#trial").get_by_role("button", name=button).click()
        if not kept:
            page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        expect(page.locator("#trial")).to_be_hidden()
        assert value_of(running, "mode") == "active"
        assert value_of(running, "imbalance_threshold") == (1.1 if kept else 1.3)


def test_a_mode_for_a_while(running: Running, settings_page: Page) -> None:
    page = settings_page
    page.locator("#mode-to").select_option("observe")
    page.locator("#mode-ttl").select_option("600")
    page.get_by_role("button", name="Switch mode").click()
    expect(page.locator("#mode-outcome")).to_contain_text("It goes back by itself at")
    expect(page.locator("#mode-now")).to_contain_text("now observe")
    assert value_of(running, "mode") == "observe"


def test_a_change_is_among_the_events(running: Running, settings_page: Page) -> None:
    running.http.patch("/v1/settings", params={"reason": "seen?"}, json={"imbalance_threshold": 2.0}).raise_for_status()
    settings_page.get_by_role("link", name="Events").click()
    expect(settings_page.locator("#events")).to_contain_text("seen?")


def test_text_from_elsewhere_stays_text(running: Running, settings_page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)><b>bold</b>"
    running.http.patch("/v1/settings", params={"reason": hostile}, json={"imbalance_threshold": 2.0}).raise_for_status()
    expect(settings_page.locator("#revisions")).to_contain_text(hostile)
    expect(settings_page.locator("#revisions img")).to_have_count(0)
