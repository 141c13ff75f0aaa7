"""A real Chromium before a real control plane with the real scheduler, and engines that report while it looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from playwright.sync_api import Browser, expect
from reporting import Engine
from running import Running, start

from llep_server.config import ServerConfig

from .browsing import Traffic, Visit, chromium, visits

expect.set_options(timeout=15_000)


@pytest.fixture(scope="package")  # while it is open this thread has a running event loop: none of other tests' business
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """visit(url, **context options): a page; no error in its console and no request elsewhere may come of it.

    `refusals`: whether the server is expected to answer with failures, which Chromium counts as errors.
    """
    with visits(browser) as open_page:
        yield open_page


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
