"""A share of `python -m bench.server_kills`: the control plane is killed while people change settings."""

from __future__ import annotations

import pytest

from bench.server_kills import run_kills


@pytest.mark.slow
def test_acknowledged_changes_survive_kills() -> None:
    measured = run_kills(changes=80, kills=4)
    assert measured["changes"] >= 80 and measured["kills"] >= 3  # the last may come when all is done
