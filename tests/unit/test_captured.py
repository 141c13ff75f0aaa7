"""Captured steps: every pair is computed once, by a rank that has its expert, whatever the placement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llep.moe.captured import TURNS, DeviceMap
from llep.placement import Placement

EXPERTS, RANKS, ROOM = 12, 4, 5
HOME = Placement.linear(EXPERTS, RANKS, 0)
LOCAL_IDS = [expert % (EXPERTS // RANKS) for expert in range(EXPERTS)]
CPU = torch.device("cpu")


def maps(replicas: tuple[tuple[int, int], ...]) -> list[DeviceMap]:
    """Each rank's, with its replicas in the rows of its room from the last on."""
    found = []
    for rank in range(RANKS):
        device_map = DeviceMap(HOME, LOCAL_IDS, rank, ROOM, CPU)
        mine = [expert for expert, other in replicas if other == rank]
        placement = Placement(HOME.home_rank, HOME.free_slots, replicas)
        device_map.follow(placement, {expert: ROOM - 1 - row for row, expert in enumerate(mine)})
        found.append(device_map)
    return found


def times_computed(found: list[DeviceMap], ids_TK: torch.Tensor) -> np.ndarray:
    """[R, T, K] how often each rank computes each pair; and that it does so with the right expert."""
    times = []
    for rank, device_map in enumerate(found):
        own_TK, room_TK = (rows.numpy() for rows in device_map.rows(ids_TK))
        is_own_TK, is_room_TK = own_TK < EXPERTS // RANKS, room_TK < ROOM
        assert (HOME.home_rank_E[ids_TK[is_own_TK]] == rank).all()
        assert (own_TK[is_own_TK] == np.array(LOCAL_IDS)[ids_TK[is_own_TK]]).all()
        times.append(is_own_TK.astype(int) + is_room_TK)
    return np.stack(times)


def placements() -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    away = [(e, rank) for e in range(EXPERTS) for rank in range(RANKS) if HOME.home_rank[e] != rank]
    return st.lists(st.sampled_from(away), unique=True, max_size=20).map(
        lambda chosen: tuple(sorted(c for rank in range(RANKS) for c in [x for x in chosen if x[1] == rank][:ROOM]))
    )


@given(placements(), st.integers(0, 40), st.integers(0, 1000))
def test_every_pair_is_computed_once(replicas: tuple[tuple[int, int], ...], tokens: int, seed: int) -> None:
    ids_TK = torch.from_numpy(np.random.default_rng(seed).integers(0, EXPERTS, (tokens, 3)).astype(np.int32))
    found = maps(replicas)
    assert (times_computed(found, ids_TK).sum(axis=0) == 1).all()
    for device_map in found:
        device_map.home_only()
        assert int((device_map.rows(ids_TK)[1] < ROOM).sum()) == 0
    assert (times_computed(found, ids_TK).sum(axis=0) == 1).all()


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_share_an_expert_evenly(copies: int) -> None:
    found = maps(tuple((0, rank) for rank in range(1, copies)))
    times_RTK = times_computed(found, torch.zeros(10 * TURNS, 1, dtype=torch.int32))
    assert times_RTK.sum(axis=(1, 2)).tolist() == [10 * TURNS // copies] * copies + [0] * (RANKS - copies)
    rows = found[1].rows(torch.zeros(TURNS, 1, dtype=torch.int32))[1]
    assert set(rows.unique().tolist()) == {ROOM - 1, ROOM}


def test_addresses_stay() -> None:
    """A CUDA graph reads them where they were when it was captured."""
    device_map = DeviceMap(HOME, LOCAL_IDS, 1, ROOM, CPU)
    tables = device_map._own_SE, device_map._room_SE, device_map._first
    before = [table.data_ptr() for table in tables]
    device_map.follow(Placement(HOME.home_rank, HOME.free_slots, ((0, 1),)), {0: 2})
    device_map.home_only()
    device_map.restore()
    after = device_map._own_SE, device_map._room_SE, device_map._first
    assert [table.data_ptr() for table in after] == before
