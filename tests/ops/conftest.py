"""The tests of operation use the control plane's: a running server, and an engine that reports."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
