"""A Chromium to look with, and engines that report while it looks."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from reporting import Engine
from running import Running

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REPORT_EVERY_S = 0.25

Visit = Callable[..., Page]


class Traffic:
    """Engines that compute and report, a thread's work, until `stop`."""

    def __init__(self, running: Running, *engines: Engine, every_s: float = REPORT_EVERY_S) -> None:
        self.running = running
        self.every_s = every_s
        self.engines = engines
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=20)

    def _run(self) -> None:
        while not self._over.is_set():
            for engine in self.engines:
                engine.run()
                assert self.running.report(engine) == []
            self._over.wait(self.every_s)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is there: `make tools` as root on Debian, or install one")
    with sync_playwright() as playwright:
        # Its sandbox wants rights that containers don't have; all it opens is the page under test.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visits(browser: Browser) -> Iterator[Visit]:
    """Open pages in it; no error in their consoles and no request elsewhere may come of them."""
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


def find_chromium() -> str | None:
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
