"""Programs that the tests of dashboards, rules and manifests want; without them they skip and say why."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

TOOLS = Path(sys.prefix) / "tools"  # where `make tools` puts them
UNPACKED = TOOLS / "usr" / "bin"


def tool(name: str, package: str = "prometheus") -> str:
    """The program's path; skips the test where there is none."""
    found = shutil.which(name, path=f"{UNPACKED}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not there: `make tools`, or install Debian's package {package}")
    return found
