"""A Chromium to look with, and engines that report while it looks."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable

from playwright.sync_api import Page
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


def find_chromium() -> str | None:
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
