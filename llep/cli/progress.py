"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_LINE_EVERY_S = 5.0


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields report(stage, done, total); total 0 where it is unknown."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task: Any = shown.add_task(what, total=None)
            yield lambda stage, done, total: shown.update(
                task, description=f"{what}: {stage}", completed=done, total=total or None
            )
        return
    last_s = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PLAIN_LINE_EVERY_S:
            last_s = time.monotonic()
            print(f"llep: {what}: {stage} {done}{f' of {total}' if total else ''}", file=sys.stderr)

    yield report
