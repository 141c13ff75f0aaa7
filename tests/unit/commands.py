"""The command line as scripts run it, without a terminal: in a process of its own, forked from one that has imported
what commands need, since to start Python and import it all takes seconds each time.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llep.cli import COMMANDS

IMPORTED_ONCE = [
    *(f"llep.cli.{name}" for name in COMMANDS),
    *("llep.simulate.chart", "llep.traces", "llep.report", "llep.tiny_models", "llep.training.text"),
    *("llep.planning.native", "llep.planning.milp", "llep.planning.question"),
]


def run_llep(
    *arguments: str,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """What it printed and its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin or "")
        process = context.Process(
            target=_run, args=(arguments, streams, str(cwd or Path.cwd()), dict(os.environ if env is None else env))
        )
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["llep", *arguments], timeout_s)
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(["llep", *arguments], code, streams[1].read_text(), streams[2].read_text())


def _run(arguments: tuple[str, ...], streams: list[Path], cwd: str, env: dict[str, str]) -> None:
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["llep", *arguments]
    from llep.cli import main

    main()
