"""A real Chromium before a real control plane with the real scheduler, and engines that report while it looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from playwright.sync_api import Browser, Page, expect, sync_playwright
from reporting import Engine
from running import Running, start

from llep_server.config import ServerConfig

from .browsing import Traffic, Visit, find_chromium

expect.set_options(timeout=15_000)


@pytest.fixture(scope="package")  # while it is open this thread has a running event loop: none of other tests' business
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is there: `make tools` as root on Debian, or install one")
    with sync_playwright() as playwright:
        # Its sandbox wants rights that containers don't have; all it opens is the page under test.
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """visit(url, **context options): a page; no error in its console and no request elsewhere may come of it.

    `refusals`: whether the server is expected to answer with failures, which Chromium counts as errors.
    """
    with _visits(browser) as open_page:
        yield open_page


@contextmanager
def _visits(browser: Browser) -> Iterator[Visit]:
    problems: list[str] = []
    contexts = []

    def open_page(url: str, *, refusals: bool = False, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        host = urlsplit(url).netloc
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("console", lambda message: _note(problems, message, refusals))
        page.on("request", lambda request: _check_host(problems, request.url, host))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def _note(problems: list[str], message: Any, refusals: bool) -> None:
    is_refusal = message.text.startswith("Failed to load resource: the server responded with a status of")
    if message.type in ("error", "warning") and not (refusals and is_refusal):
        problems.append(f"{message.type}: {message.text}")


def _check_host(problems: list[str], url: str, host: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("blob", "data") and parts.netloc != host:
        problems.append(f"asked another host: {url}")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Open to all on loopback, no engine yet."""
    yield from start(ServerConfig(), tmp_path / "state")


@pytest.fixture
def report() -> Iterator[Callable[..., Traffic]]:
    """report(running, *engines): they report until the test ends."""
    started: list[Traffic] = []

    def begin(running: Running, *engines: Engine) -> Traffic:
        started.append(Traffic(running, *engines))
        return started[-1]

    yield begin
    for traffic in started:
        traffic.stop()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With two engines under load, shared by tests that leave it as it is."""
    for running in start(ServerConfig(), tmp_path_factory.mktemp("state")):
        traffic = Traffic(
            running, Engine(), Engine(name="large", ep_size=4, layer_numbers=tuple(range(12)), num_experts=32)
        )
        yield running
        traffic.stop()
