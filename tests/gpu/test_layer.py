"""The layer on a GPU: virtual ranks of one process, real kernels, copies on the device in the place of links."""

from __future__ import annotations

import pytest
import torch

from tests.virtual_layer import assert_equals_one_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.mark.parametrize("is_replicated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "num_experts"), [(1, 5), (2, 7), (4, 16), (8, 16)])
def test_equals_one_process(size: int, num_experts: int, dtype: torch.dtype, is_replicated: bool) -> None:
    device = torch.device("cuda", 0)
    lends = assert_equals_one_process(
        device, dtype, size, num_experts, is_round_robin=False, is_replicated=is_replicated
    )
    assert (lends > 0) == (size > 1)


def test_in_blocks() -> None:
    device = torch.device("cuda", 0)
    assert assert_equals_one_process(
        device, torch.bfloat16, 8, 16, is_round_robin=True, is_replicated=False, room=(5, 21)
    )
