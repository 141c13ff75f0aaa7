"""`run_ranks` for tests: see tests.dist.ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.dist.ranks import start_ranks


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return start_ranks
