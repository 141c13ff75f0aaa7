"""A control plane with keys: the page asks for one, keeps it in its tab, and says what it is not good for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from reporting import Engine
from running import Running, start

from llep_server.config import ServerConfig

from .browsing import Traffic, Visit

READ, ADMIN = "read-key-for-the-page-1", "admin-key-for-the-page-1"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"viewer read {READ}\nalice admin {ADMIN}\n")
    for running in start(ServerConfig(keys_file=folder / "keys"), folder / "state"):
        traffic = Traffic(running, Engine())
        yield running
        traffic.stop()


def test_the_key_is_asked_for_before_anything_is(guarded: Running, visit: Visit) -> None:
    page = visit(guarded.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This control plane wants a key")
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    page.keyboard.type(ADMIN)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#tiles")).to_contain_text("→")
    expect(page.locator("#link-text")).to_have_text("live")
    kept = page.evaluate(
        "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href]"
    )
    assert ADMIN in kept[0]
    assert all(ADMIN not in place for place in kept[1:])
    page.reload()
    expect(page.locator("#tiles")).to_contain_text("→")


def test_a_wrong_key_is_asked_for_again(guarded: Running, visit: Visit) -> None:
    page = visit(guarded.url, refusals=True)
    page.get_by_label("Key", exact=True).fill("not-a-key-of-anybody")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key-problem")).to_contain_text("the key is not known")
    page.get_by_label("Key", exact=True).fill(ADMIN)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#tiles")).to_contain_text("→")


def test_a_key_with_scope_read_looks_and_changes_nothing(guarded: Running, visit: Visit) -> None:
    page = visit(f"{guarded.url}/#/settings", refusals=True)
    page.get_by_label("Key", exact=True).fill(READ)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#set-imbalance_threshold")).to_have_value("1.3")
    page.locator("#set-imbalance_threshold").fill("1.9")
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(page.locator("#settings-outcome")).to_contain_text("needs scope admin")
    expect(page.locator(".banner")).to_contain_text("This key has scope read")
