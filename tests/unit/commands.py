"""The command line as scripts run it: a process of its own, without a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = "from llep.cli import main; main()"


def run_llep(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """What it printed and its exit code."""
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=cwd)
