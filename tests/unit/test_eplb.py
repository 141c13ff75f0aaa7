"""DeepSeek's published example comes out exactly; packing and copying keep their rules."""

from __future__ import annotations

import numpy as np
import pytest

from llep.planning.eplb import pack, plan_eplb, replicate

# The example of DeepSeek's README: 2 layers, 12 experts, 16 slots, 4 groups, 2 nodes, 8 GPUs.
LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def rank_loads(loads_E: np.ndarray, slots: np.ndarray, num_ranks: int) -> list[float]:
    copies = np.bincount(slots, minlength=len(loads_E))
    return (loads_E / copies)[slots].reshape(num_ranks, -1).sum(axis=1).tolist()


def test_the_published_example() -> None:
    slots = plan_eplb(LOADS, num_slots=16, num_ranks=8, num_groups=4, num_nodes=2)
    assert slots.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    loads = [rank_loads(loads_E, layer, 8) for loads_E, layer in zip(LOADS, slots, strict=True)]
    assert loads == [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
    ]
    assert [round(max(layer) / np.mean(layer), 3) for layer in loads] == [1.208, 1.242]


def test_global_is_taken_when_groups_do_not_divide_over_nodes() -> None:
    as_global = plan_eplb(LOADS, num_slots=16, num_ranks=8)
    assert (plan_eplb(LOADS, num_slots=16, num_ranks=8, num_groups=3, num_nodes=2) == as_global).all()
    hierarchical = plan_eplb(LOADS, num_slots=16, num_ranks=8, num_groups=4, num_nodes=2)
    assert not (as_global == hierarchical).all()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 2), (8, 4)])
def test_every_expert_has_a_slot_and_groups_stay_in_their_node(seed: int, groups: int, nodes: int) -> None:
    loads_LE = np.random.default_rng(seed).lognormal(sigma=1.5, size=(3, 64))
    slots = plan_eplb(loads_LE, num_slots=80, num_ranks=16, num_groups=groups, num_nodes=nodes)
    for layer in slots:
        assert set(layer.tolist()) == set(range(64))
        groups_of_node = [set((node // (64 // groups)).tolist()) for node in layer.reshape(nodes, -1)]
        assert sum(map(len, groups_of_node)) == groups


def test_pack_is_heaviest_first_to_the_lightest_with_room() -> None:
    assert pack([1, 9, 5, 5], 2) == [[1, 0], [2, 3]]
    assert pack([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]


def test_replicate_gives_copies_by_load_per_copy() -> None:
    experts, copies = replicate(np.array([10.0, 50.0, 20.0]), 6)
    assert experts == [0, 1, 2, 1, 1, 2]
    assert copies.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 8}, "num_slots must be at least the number of experts, 12, got 8"),
        ({"num_slots": 17}, "num_slots=17 must be a multiple of num_ranks=8"),
        ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({"num_groups": 5}, "num_experts=12 must be a multiple of num_groups=5"),
        ({"num_nodes": 3, "num_groups": 3}, "num_ranks=8 must be a multiple of num_nodes=3"),
        ({"loads_LE": LOADS[0]}, "loads must have shape"),
        ({"loads_LE": LOADS - 5.0}, "finite and >= 0"),
        ({"loads_LE": LOADS * np.nan}, "finite and >= 0"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    arguments = {"loads_LE": LOADS, "num_slots": 16, "num_ranks": 8, **changes}
    with pytest.raises(ValueError, match=message):
        plan_eplb(**arguments)
