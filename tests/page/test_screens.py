"""What every view shows: at a desk and on a phone, light and dark, with and without engines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from reporting import Engine
from running import Running

from .browsing import Traffic, Visit

VIEWS = {
    "live": "Hot experts",
    "decisions": "Sampled plans",
    "placement": "Resident replicas",
    "settings": "History",
    "recordings": "Record counts",
    "events": "Audit trail",
}
SCREENS = {
    "desk": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True},
}


def width_too_much(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("screen", SCREENS)
def test_every_view_fits_its_screen(busy: Running, visit: Visit, screen: str) -> None:
    page = visit(busy.url, **SCREENS[screen])
    for view, heading in VIEWS.items():
        page.get_by_role("link", name=view.capitalize(), exact=True).click()
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        expect(page.locator(f'nav [href^="#/{view}"]')).to_have_attribute("aria-current", "page")
        expect(page.locator(".problem:visible")).to_have_count(0)
        expect(page.locator("#link-text")).to_have_text("live")
        assert width_too_much(page) <= 0, view


class Phased(Engine):
    """Skewed prefill steps, and decode steps that are nearly even."""

    def run(self, tokens: int = 1024, hot_share: float = 0.9, phase: str = "prefill") -> None:
        super().run(tokens=2048, hot_share=0.9, phase="prefill")
        super().run(tokens=256, hot_share=0.25, phase="decode")


def test_everything_follows_the_step_phase(running: Running, visit: Visit, report: Callable[..., Traffic]) -> None:
    report(running, Phased(num_experts=8, counting_since_s=time.time()))
    page = visit(running.url)
    imbalance, hot = page.locator("#imbalance canvas"), page.locator("#hot tbody tr").first
    tile = page.locator("#tiles .tile")
    for phase, ratio, load, lends, spilled in (
        ("prefill", r"now 1\.[6-9]\d before", r"[34]\.\d\d×", r"Lends[1-9]", r"Spilled[1-9]"),
        ("decode", r"now 1\.[0-3]", r"1\.\d\d×", r"Lends0/s", r"Spilled0\s%"),
    ):
        page.locator("#phase").get_by_text(phase).click()
        expect(imbalance).to_have_attribute("aria-label", re.compile(ratio))
        expect(hot).to_contain_text(re.compile(load))
        expect(tile.filter(has_text="Lends")).to_have_text(re.compile(lends))
        expect(tile.filter(has_text="Spilled")).to_have_text(re.compile(spilled))
        expect(page.locator("#reasons")).to_contain_text("lent" if phase == "prefill" else "balanced")


def test_memory_of_devices_and_what_lending_was_worth(
    running: Running, visit: Visit, report: Callable[..., Traffic]
) -> None:
    engine = Engine(counting_since_s=time.time(), start={"mode": "off"})
    running.report(engine)
    running.report(engine)
    page = visit(running.url)
    expect(page.locator("#device-hint")).to_contain_text("8 GiB free of 16 GiB")
    gain = page.locator("#tiles .tile").filter(has_text="Measured gain")
    expect(gain).to_contain_text("no probes")
    report(running, engine)
    page.reload()
    expect(gain).to_contain_text(re.compile(r"\d of \d+ steps"))


def test_live_shows_what_the_engines_report(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    expect(page.locator("#engines tbody tr")).to_have_count(2)
    expect(page.locator("#engines tr[data-selected]")).to_contain_text("org/tiny-moe")
    expect(page.locator("#engines-count")).to_have_text("2 of 2 live")
    imbalance = page.locator("#tiles .tile").filter(has_text="Imbalance").locator("dd").first
    expect(imbalance).to_have_text(re.compile(r"^1\.\d\d → 1\.\d\d$"))
    before, after = (float(part) for part in imbalance.inner_text().split(" → "))
    assert before > 1.3 > after
    expect(page.locator("#reasons [data-reason=lend]")).to_contain_text("weights were lent")
    expect(page.locator("#imbalance canvas")).to_have_attribute("aria-label", re.compile(r"before, 1\.\d\d after"))
    expect(page.locator("#ranks canvas")).to_have_attribute("aria-label", re.compile("2 ranks"))
    expect(page.locator("#memory canvas")).to_have_attribute("aria-label", re.compile("2 ranks"))
    expect(page.locator("#matrix canvas")).to_have_attribute("aria-label", re.compile("3 layers by 2 ranks"))
    expect(page.locator("#hot tbody tr").first).to_contain_text("×")
    page.get_by_text("by expert", exact=True).click()
    expect(page.locator("#matrix canvas")).to_have_attribute("aria-label", re.compile("3 layers by 16 experts"))
    expect(page).to_have_title(re.compile(r"^1\.\d\d · tiny · llep$"))


HAS_LINE = """() => {
    const canvas = document.querySelector("#imbalance canvas");
    const style = getComputedStyle(document.documentElement);
    const wanted = style.getPropertyValue("--after").trim().slice(1).match(/../g).map((hex) => parseInt(hex, 16));
    const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    const pen = copy.getContext("2d", { willReadFrequently: true });
    if (!canvas.width) return false;
    pen.drawImage(canvas, 0, 0);
    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < data.length; at += 4) if (wanted.every((value, of) => data[at + of] === value)) return true;
    return false;
}"""


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_browser_whose_clock_is_off_sees_the_same(busy: Running, visit: Visit, hours: int) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    page.add_init_script(f"{{ const now = Date.now; Date.now = () => now() + {hours} * 3600e3; }}")
    page.reload()
    expect(page.locator("#imbalance canvas")).to_have_attribute("aria-label", re.compile("now .* before"))
    page.wait_for_function(HAS_LINE, timeout=10_000)
    expect(page.locator("#engines tbody tr").first).to_contain_text(re.compile("(now|[0-9] s ago)$"))


def test_another_engine_is_chosen_in_the_table_and_kept_in_the_address(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    page.get_by_role("button", name="large", exact=True).click()
    expect(page.locator("#engine-name")).to_have_text("large")
    expect(page.locator("#matrix canvas")).to_have_attribute("aria-label", re.compile("12 layers by 4 ranks"))
    assert page.url.endswith("#/live?engine=large")
    page.reload()
    expect(page.locator("#engine-name")).to_have_text("large")
    page.go_back()
    expect(page.locator("#engine-name")).to_have_text("tiny")


def test_an_engine_that_is_not_here_gives_way_to_one_that_is(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=nobody")
    expect(page.locator("#engine-name")).to_have_text(re.compile("tiny|large"))
    expect(page.locator("#tiles")).to_contain_text("→")
    assert page.url.endswith("/#/live")


def test_the_heatmap_saves_as_csv(busy: Running, visit: Visit) -> None:
    page = visit(f"{busy.url}/#/live?engine=tiny")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    assert "layer" in download.value.path().read_text().splitlines()[0]


def test_without_an_engine_it_says_how_to_start_one_and_notices_it(
    running: Running, visit: Visit, report: Callable[..., Traffic]
) -> None:
    page = visit(running.url)
    expect(page.get_by_role("heading", name="No engine has reported yet")).to_be_visible()
    expect(page.get_by_text("llep serve MODEL")).to_be_visible()
    expect(page.locator("#link-text")).to_have_text("no engine")
    report(running, Engine())
    expect(page.get_by_role("heading", name="No engine has reported yet")).to_be_hidden()
    expect(page.locator("#engine-name")).to_have_text("tiny")


def test_an_idle_engine_is_no_failure(running: Running, visit: Visit) -> None:
    assert running.report(Engine()) == []
    page = visit(running.url)
    expect(page.locator("#tiles")).to_contain_text("idle")
    expect(page.locator("#imbalance")).to_contain_text("No token in the last 5 min")
    expect(page.locator("#hot")).to_contain_text("No expert stands out")


def test_many_engines_can_be_filtered(running: Running, visit: Visit) -> None:
    for number in range(12):
        assert running.report(Engine(name=f"engine-{number}")) == []
    page = visit(running.url)
    expect(page.locator("#engines tbody tr")).to_have_count(12)
    page.get_by_label("Filter engines").fill("engine-7")
    expect(page.locator("#engines tbody tr")).to_have_count(1)


def test_old_figures_are_called_old(running: Running, visit: Visit, report: Callable[..., Traffic]) -> None:
    traffic = report(running, Engine(start={"report_interval_s": 0.1}))
    page = visit(running.url, refusals=True)
    expect(page.locator("#tiles")).to_contain_text("→")
    traffic.stop()
    expect(page.get_by_role("alert")).to_contain_text("tiny stopped reporting")
    expect(page.locator("#link-text")).to_contain_text("stale, last seen")
    expect(page.locator("html")).to_have_attribute("data-old", "engine")
    traffic = report(running, *traffic.engines)
    expect(page.locator(".banner")).to_have_count(0)

    running.caller.is_up = False
    expect(page.get_by_role("alert")).to_contain_text("The scheduler is away.")
    expect(page.get_by_role("alert")).to_contain_text("start one with 'llep serve'")
    expect(page.locator("html")).to_have_attribute("data-old", "all")
    running.caller.is_up = True
    expect(page.locator(".banner")).to_have_count(0)
    expect(page.locator("html")).to_have_attribute("data-old", "nothing")
