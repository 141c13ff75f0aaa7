"""The example that docs/layer.md shows runs, on as many real processes as torchrun starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/layer.py"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_example_runs(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", EXAMPLE]
    found = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert found.returncode == 0, found.stderr
    assert "(512, 64) pairs routed to each rank" in found.stdout, found.stdout
    routed, computed = (eval(part.split("rank ")[-1]) for part in found.stdout.strip().split(", computed "))
    assert sum(routed) == sum(computed) == ranks * 1024
    if ranks > 1:
        assert max(routed) == ranks * 1024 and max(computed) < 1.1 * 1024 * ranks / 2, found.stdout
