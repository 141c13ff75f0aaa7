"""Resident replicas over real gloo processes, under random changes of settings and placements."""

from __future__ import annotations

import pytest
import torch

from llep.moe.transport import Transport
from tests.dist.ranks import start_ranks
from tests.following import Found, assert_followed, follow_changes


def followed(rank: int, size: int, changes: int, seed: int, is_replicated: bool) -> Found:
    with torch.inference_mode():
        transport = Transport(range(size), torch.device("cpu"), watchdog_s=30)
        return follow_changes(transport, changes, seed, is_replicated=is_replicated)


@pytest.mark.parametrize(("size", "is_replicated"), [(2, True), (3, False), (4, True)])
def test_outputs_are_the_same_whatever_is_told(size: int, is_replicated: bool) -> None:
    assert_followed(start_ranks(followed, size, 40, 10 * size, is_replicated))
