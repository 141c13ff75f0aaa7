"""Resident replicas on a GPU: virtual ranks of one process under random changes of settings and placements."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llep.moe.virtual import VirtualGroup
from tests.following import assert_followed, follow_changes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.mark.parametrize("is_replicated", [False, True])
def test_outputs_are_the_same_whatever_is_told(is_replicated: bool) -> None:
    body = partial(follow_changes, changes=30, seed=3, is_replicated=is_replicated)
    assert_followed(VirtualGroup(4, torch.device("cuda", 0)).run(body))
