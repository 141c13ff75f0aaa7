"""What the layer allocates, under any skew, is what a balanced batch needs: bench.memory's count, of a narrow layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.memory import BASE, measure
from tests.dist.ranks import start_ranks

NARROW = replace(BASE, hidden=64)
MOST = 1.15  # of the balanced batch's peak


def peak_bytes(share: float, hot: int) -> int:
    ranks = start_ranks(measure, 2, replace(NARROW, share=share, hot=hot), timeout_s=120)
    return max(int(rank["llep_peak_bytes"]) for rank in ranks)


@pytest.fixture(scope="module")
def balanced_bytes() -> int:
    return peak_bytes(0.0, 0)


@pytest.mark.parametrize(("share", "hot"), [(0.3, 4), (1.0, 1)])
def test_no_skew_needs_more_than_a_balanced_batch(balanced_bytes: int, share: float, hot: int) -> None:
    assert peak_bytes(share, hot) <= MOST * balanced_bytes
