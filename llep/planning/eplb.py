"""DeepSeek's Expert Parallelism Load Balancer, written from its description: which experts the physical slots hold.

Every rank has the same number of slots. The experts with the highest load per copy get further copies until all slots
are taken; copies are packed onto ranks heaviest first. Nothing keeps two copies of an expert off one rank, and nothing
is said about what is already where: that is what `replicas` adds.

Shape letters: L layers, E experts, S slots over all ranks (those of rank 0 first).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def plan_eplb(loads_LE: Loads, num_slots: int, num_ranks: int, num_groups: int = 1, num_nodes: int = 1) -> Ids:
    """The expert [layers, num_slots] that each slot holds.

    Hierarchical where num_groups is a multiple of num_nodes: whole groups go to nodes, copies are made within a node.
    Else, and with one node, global. Raises ValueError for numbers that do not divide as this needs.
    """
    loads_LE = np.asarray(loads_LE, dtype=np.float64)
    _check(loads_LE, num_slots, num_ranks, num_groups, num_nodes)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    return np.array([_plan_layer(loads_E, num_slots, num_ranks, num_groups, num_nodes) for loads_E in loads_LE])


def pack(weights: Sequence[float] | npt.NDArray[np.float64], num_packs: int) -> list[list[int]]:
    """Items in equally many per pack: heaviest first, each to the lightest pack that has room. Ties: lowest index."""
    room = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, number) for number in range(num_packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        weight, number = heapq.heappop(lightest)
        packs[number].append(item)
        if len(packs[number]) < room:
            heapq.heappush(lightest, (weight + weights[item], number))
    return packs


def replicate(loads: npt.NDArray[np.float64], num_copies: int) -> tuple[list[int], Ids]:
    """The expert of each copy, and the copies of each expert: again and again one more for the highest load per copy.

    Ties: lowest index.
    """
    copies = np.ones(len(loads), dtype=np.int64)
    experts = list(range(len(loads)))
    for _ in range(num_copies - len(loads)):
        expert = int(np.argmax(loads / copies))
        copies[expert] += 1
        experts.append(expert)
    return experts, copies


def _plan_layer(
    loads_E: npt.NDArray[np.float64], num_slots: int, num_ranks: int, num_groups: int, num_nodes: int
) -> list[int]:
    groups = np.arange(len(loads_E)).reshape(num_groups, -1)
    slots: list[int] = []
    for node_groups in pack(loads_E[groups].sum(axis=1), num_nodes):
        experts = groups[node_groups].ravel()
        copy_of, copies = replicate(loads_E[experts], num_slots // num_nodes)
        load_per_copy = (loads_E[experts] / copies)[copy_of]
        for rank in pack(load_per_copy, num_ranks // num_nodes):
            slots.extend(int(experts[copy_of[copy]]) for copy in rank)
    return slots


def _check(loads_LE: npt.NDArray[np.float64], num_slots: int, num_ranks: int, num_groups: int, num_nodes: int) -> None:
    if loads_LE.ndim != 2 or not loads_LE.size:
        raise ValueError(f"loads must have shape (layers, experts), got {loads_LE.shape}")
    if not (np.isfinite(loads_LE).all() and (loads_LE >= 0).all()):
        raise ValueError("loads must be finite and >= 0")
    num_experts = loads_LE.shape[1]
    for name, value in (("num_ranks", num_ranks), ("num_groups", num_groups), ("num_nodes", num_nodes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_slots < num_experts:
        raise ValueError(f"num_slots must be at least the number of experts, {num_experts}, got {num_slots}")
    for name, value, divisor_name, divisor in (
        ("num_slots", num_slots, "num_ranks", num_ranks),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        ("num_experts", num_experts, "num_groups", num_groups),
    ):
        if value % divisor:
            raise ValueError(f"{name}={value} must be a multiple of {divisor_name}={divisor}")
