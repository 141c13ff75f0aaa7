"""One JSON line per measured case, with what is needed to read it later: date, commit, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_record(name: str, measured: dict[str, Any], *, append: bool) -> None:
    """Print `measured` with its circumstances; with `append` also add the line to results/<name>.jsonl."""
    line = json.dumps({**_circumstances(), **measured})
    print(line, flush=True)
    if append:
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")


def _circumstances() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
