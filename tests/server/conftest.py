"""Fixtures of the control plane's tests: a running server, and the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reporting import Engine
from running import Running, start

from llep_server.config import ServerConfig

LLEP = Path(sys.executable).with_name("llep")
Llep = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Open to all on loopback, no engine yet."""
    yield from start(ServerConfig(), tmp_path / "state")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same, shared by tests that leave it as it is."""
    yield from start(ServerConfig(), tmp_path_factory.mktemp("state"))


@pytest.fixture
def busy(running: Running) -> Iterator[Running]:
    """With one engine that has done three steps, and goes on reporting: on a slow machine commands take seconds."""
    engine = Engine()
    running.report(engine)
    for _ in range(3):
        engine.run(tokens=256)
    running.report(engine)
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(0.3):
            running.report(engine)

    reporting = threading.Thread(target=go_on)
    reporting.start()
    yield running
    ended.set()
    reporting.join()


@pytest.fixture
def environ() -> dict[str, str]:
    """The environment of a command: this one's, without what somebody set for llep."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "RAY_"))}


@pytest.fixture
def llep(environ: dict[str, str]) -> Llep:
    """llep(*arguments, **variables): run the real command to its end."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LLEP, *arguments], env={**environ, **variables}, capture_output=True, text=True, timeout=60, check=False
        )

    return run
