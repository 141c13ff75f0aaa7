"""The lending pool: room for foreign experts' weights, reserved once per rank and shared by all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llep.errors import UnsupportedConfiguration


def bytes_per_expert(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes of one expert: a row of every tensor whose first dimension is local experts."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in weights.values())


@dataclass(frozen=True, slots=True)
class LendingPool:
    """tensors[name] is [slots, *weights[name].shape[1:]]; a lend fills one slot in each."""

    slots: int
    tensors: dict[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @classmethod
    def reserve(cls, weights: Mapping[str, torch.Tensor], slots_per_rank: int, budget_bytes: int = 0) -> LendingPool:
        """A pool for experts shaped like `weights`.

        budget_bytes > 0 decides the slots in place of slots_per_rank, and must hold at least one. The memory is
        touched at once, so that what sizes the KV cache afterwards sees it. Raises UnsupportedConfiguration if it is
        not to be had.
        """
        local_experts = next(iter(weights.values())).shape[0]
        per_slot = bytes_per_expert(weights)
        slots = min(budget_bytes // per_slot, local_experts) if budget_bytes else slots_per_rank
        if budget_bytes and not slots:
            raise UnsupportedConfiguration(
                f"memory_budget_bytes={budget_bytes} is less than one slot of {per_slot} bytes: raise it to at least "
                f"{per_slot}, or set it to 0 and slots_per_rank=0 to lend nothing",
                param="memory_budget_bytes",
            )
        if not budget_bytes and slots > local_experts:
            raise UnsupportedConfiguration(
                f"slots_per_rank={slots} is above the {local_experts} local experts of a rank: lower it",
                param="slots_per_rank",
            )
        try:
            # zeros, not empty: untouched pages are not counted as used memory.
            tensors = {name: tensor.new_zeros((slots, *tensor.shape[1:])) for name, tensor in weights.items()}
        except (RuntimeError, MemoryError) as error:
            raise UnsupportedConfiguration(
                f"the lending pool of {slots} slots x {per_slot} bytes = {slots * per_slot} bytes per rank can't be "
                f"reserved: lower slots_per_rank or set memory_budget_bytes ({error})",
                param="slots_per_rank",
            ) from error
        return cls(slots, tensors)
