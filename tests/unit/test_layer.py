"""The layer on ranks that are threads: every layout and size, equal to one process that holds all experts."""

from __future__ import annotations

import pytest
import torch

from tests.virtual_layer import assert_equals_one_process

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_replicated", [False, True])
@pytest.mark.parametrize("is_round_robin", [False, True])
@pytest.mark.parametrize(("size", "num_experts"), [(1, 5), (2, 7), (3, 8), (4, 16), (8, 16), (8, 21)])
def test_equals_one_process(size: int, num_experts: int, is_round_robin: bool, is_replicated: bool) -> None:
    """Also where the experts can't be dealt out evenly."""
    lends = assert_equals_one_process(
        CPU, torch.float32, size, num_experts, is_round_robin=is_round_robin, is_replicated=is_replicated
    )
    assert (lends > 0) == (size > 1)


@pytest.mark.parametrize("is_replicated", [False, True])
def test_bfloat16(is_replicated: bool) -> None:
    assert assert_equals_one_process(CPU, torch.bfloat16, 4, 8, is_round_robin=False, is_replicated=is_replicated)


@pytest.mark.parametrize("few_rows", [0, 2, 10, 1000])
def test_own_rows_alone_or_with_those_that_arrive(few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llep.moe.layer.FEW_ROWS", few_rows)
    assert assert_equals_one_process(CPU, torch.float32, 4, 16, is_round_robin=False, is_replicated=False)


@pytest.mark.parametrize(("wire_rows", "chunk_rows"), [(7, 1), (21, 5), (70, 64)])
def test_in_blocks(wire_rows: int, chunk_rows: int) -> None:
    assert assert_equals_one_process(
        CPU, torch.float32, 8, 16, is_round_robin=False, is_replicated=False, room=(chunk_rows, wire_rows)
    )
