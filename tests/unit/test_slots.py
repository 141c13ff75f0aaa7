"""The lending pool: reserved in full, or refused with the bytes and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llep.errors import UnsupportedConfiguration
from llep.moe.replicas import Room
from llep.moe.slots import LendingPool, available_host_bytes, bytes_per_expert

WEIGHTS = {"w": torch.ones(4, 3, 5), "scale": torch.ones(4, 2, dtype=torch.float16), "bias": torch.ones(4, 5)}
PER_EXPERT = 3 * 5 * 4 + 2 * 2 + 5 * 4


def test_a_slot_has_room_for_every_tensor_of_an_expert() -> None:
    assert bytes_per_expert(WEIGHTS) == PER_EXPERT
    pool = LendingPool.reserve(WEIGHTS, 3)
    assert pool.bytes == 3 * PER_EXPERT
    assert {name: tuple(tensor.shape) for name, tensor in pool.tensors.items()} == {
        "w": (3, 3, 5),
        "scale": (3, 2),
        "bias": (3, 5),
    }
    assert pool.tensors["scale"].dtype == torch.float16


@pytest.mark.parametrize(("budget", "slots"), [(PER_EXPERT, 1), (3 * PER_EXPERT - 1, 2), (99 * PER_EXPERT, 4)])
def test_a_budget_decides_the_slots_and_is_never_exceeded(budget: int, slots: int) -> None:
    pool = LendingPool.reserve(WEIGHTS, slots_per_rank=4, budget_bytes=budget)
    assert pool.slots == slots and pool.bytes <= budget


def test_no_slots_is_fine() -> None:
    assert LendingPool.reserve(WEIGHTS, 0).bytes == 0


def test_refusals_name_the_value_and_the_way_out() -> None:
    with pytest.raises(UnsupportedConfiguration, match=f"memory_budget_bytes=10 is less than one slot of {PER_EXPERT}"):
        LendingPool.reserve(WEIGHTS, 4, budget_bytes=10)
    with pytest.raises(UnsupportedConfiguration, match="slots_per_rank=5 is above the 4 local experts"):
        LendingPool.reserve(WEIGHTS, 5)


def test_more_than_there_is_is_refused_before_it_is_touched() -> None:
    assert LendingPool.reserve(WEIGHTS, 2, available_bytes=2 * PER_EXPERT).slots == 2
    with pytest.raises(UnsupportedConfiguration, match=f"slots_per_rank=2: .* {2 * PER_EXPERT - 1} bytes .*: lower sl"):
        LendingPool.reserve(WEIGHTS, 2, available_bytes=2 * PER_EXPERT - 1)
    with pytest.raises(UnsupportedConfiguration, match="memory_budget_bytes=500: .*: lower memory_budget_bytes"):
        LendingPool.reserve(WEIGHTS, 2, budget_bytes=500, available_bytes=100)


def test_room_for_replicas_is_reserved_in_full_or_refused() -> None:
    room = Room.reserve(WEIGHTS, 3, budget_bytes=4 * PER_EXPERT, available_bytes=3 * PER_EXPERT)
    assert room.bytes == 3 * PER_EXPERT and room.bank["w"].shape == (3, 3, 5)
    assert LendingPool.reserve(WEIGHTS, 4, budget_bytes=4 * PER_EXPERT, other_bytes=room.bytes).slots == 1
    with pytest.raises(
        UnsupportedConfiguration, match="replica_slots_per_rank=4: .* all of memory_budget_bytes=300 or"
    ):
        Room.reserve(WEIGHTS, 4, budget_bytes=300)
    with pytest.raises(UnsupportedConfiguration, match="replica_slots_per_rank=4: .* can have: lower it"):
        Room.reserve(WEIGHTS, 4, available_bytes=4 * PER_EXPERT - 1)


def test_what_the_host_has_is_between_nothing_and_all() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    found = available_host_bytes()
    assert found is not None and 0 < found < total


def test_a_pool_is_in_use_at_once_so_that_the_kv_cache_is_sized_with_it() -> None:
    def used_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = used_bytes()
    pool = LendingPool.reserve({"w": torch.ones(64, 256, 256)}, 64)
    assert used_bytes() - before > 0.9 * pool.bytes > 10e6
