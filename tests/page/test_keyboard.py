"""The page without a pointer."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect
from reporting import Engine
from running import Running

from .browsing import Traffic, Visit

FOCUSED = "document.activeElement.id || document.activeElement.closest('[id]')?.id"


def tab_to(page: Page, wanted: str, most: int = 60) -> None:
    """Press Tab until `wanted`, an id or that of the nearest element around, has the focus; it must be seen to."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED) == wanted:
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", wanted
            return
    raise AssertionError(f"Tab does not lead to {wanted}")


def test_the_first_tab_skips_to_the_content(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#engine-name")).to_have_text("tiny")


def test_charts_are_read_with_arrow_keys(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    expect(page.locator("#matrix canvas")).to_have_attribute("aria-label", re.compile("3 layers by 2 ranks"))
    for chart, pressed, words in (
        ("imbalance", "ArrowLeft", re.compile(r"before \d")),
        ("ranks", "ArrowRight", re.compile("rank 0")),
        ("memory", "End", re.compile("rank 1")),
        ("matrix", "ArrowDown", re.compile("layer 2, rank 0")),
        ("matrix", "h", re.compile("fair share")),
    ):
        page.locator(f"#{chart} canvas").focus()
        page.keyboard.press(pressed)
        expect(page.locator(f"#{chart} .tip")).to_have_text(words)
        expect(page.locator("#announcer")).to_have_text(words)
    page.keyboard.press("Escape")
    expect(page.locator("#matrix .tip")).to_be_hidden()


def test_a_setting_is_changed_by_keyboard_alone(running: Running, visit: Visit, report: Callable[..., Traffic]) -> None:
    report(running, Engine())
    page = visit(running.url)
    expect(page.locator("#tiles")).to_contain_text("→")
    tab_to(page, "views")  # a link in it
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#set-imbalance_threshold")).to_have_value("1.3")
    tab_to(page, "set-imbalance_threshold")
    page.keyboard.press("Control+A")
    page.keyboard.type("1.6")
    page.keyboard.press("Enter")  # a form's Enter is the harmless one: a dry run
    expect(page.locator("#settings-outcome")).to_contain_text("Dry run")
    tab_to(page, "settings-apply")
    page.keyboard.press("Enter")
    expect(page.locator("#settings-outcome")).to_contain_text("Revision 1 is live on tiny")
