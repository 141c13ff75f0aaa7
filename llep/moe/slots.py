"""The lending pool: room for foreign experts' weights, reserved once per rank and shared by all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from llep.errors import UnsupportedConfiguration

_CONTAINER = Path("/sys/fs/cgroup")


def bytes_per_expert(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes of one expert: a row of every tensor whose first dimension is local experts."""
    return sum(span(tensor) * tensor.element_size() for tensor in weights.values())


def span(tensor: torch.Tensor) -> int:
    """Values from an expert's first to its last in memory: more than it has where a layout pads."""
    inner = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in inner) if tensor[:1].numel() else 0


def is_lendable(tensor: torch.Tensor) -> bool:
    """Whether each expert is a stretch of memory of its own, in whatever order its values are: transposed, padded."""
    return tensor.ndim > 0 and (len(tensor) < 2 or tensor.stride(0) >= span(tensor))


def bytes_of_expert(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """The memory of one expert, as it is, as [bytes] uint8."""
    stretch = tensor.as_strided((span(tensor),), (1,), tensor.storage_offset() + row * tensor.stride(0))
    return stretch.view(torch.uint8)


def zeros_like_experts(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ...] of zeros with the strides of these experts: not empty, for untouched pages don't count as used."""
    apart = max(tensor.stride(0), span(tensor))
    zeros = torch.zeros(rows * apart * tensor.element_size(), dtype=torch.uint8, device=tensor.device)
    return zeros.view(tensor.dtype).as_strided((rows, *tensor.shape[1:]), (apart, *tensor.stride()[1:]))


class Copy(NamedTuple):
    """One resident replica on its way: from its home rank into a row of dst_rank's room."""

    layer: int  # its place among the layers
    expert: int
    src_rank: int
    dst_rank: int
    row: int


@dataclass(frozen=True, slots=True)
class Residents:
    """Resident replicas of one layer on this rank: row_of[expert] is the expert's row in `bank`."""

    bank: Mapping[str, torch.Tensor] = field(default_factory=dict)
    row_of: Mapping[int, int] = field(default_factory=dict)


NO_RESIDENTS = Residents()


def available_host_bytes() -> int | None:
    """Bytes that this machine, or the container, can still give to all its processes; None where nobody says."""
    found = [
        bytes_left for bytes_left in (_machine_bytes("MemAvailable"), _container_bytes()) if bytes_left is not None
    ]
    return min(found, default=None)


def total_host_bytes() -> int | None:
    """Bytes that this machine, or the container, has for all its processes; None where nobody says."""
    return _least(_machine_bytes("MemTotal"), _container_limit())


def _least(*known: int | None) -> int | None:
    return min((value for value in known if value is not None), default=None)


def _machine_bytes(field: str) -> int | None:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _container_bytes() -> int | None:
    """What a cgroup (version 2) leaves; file pages that can be dropped count as free."""
    limit = _container_limit()
    if limit is None:
        return None
    try:
        used = int((_CONTAINER / "memory.current").read_text())
        stat = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        return max(limit - used + int(stat["inactive_file"]), 0)
    except (OSError, KeyError, ValueError):
        return None


def _container_limit() -> int | None:
    try:
        return int((_CONTAINER / "memory.max").read_text())
    except (OSError, ValueError):  # 'max': no limit
        return None


@dataclass(frozen=True, slots=True)
class LendingPool:
    """tensors[name] is [slots, *weights[name].shape[1:]]; a lend fills one slot in each.

    A pool that was reserved in halves is used half by half: layers take turns.
    """

    slots: int
    tensors: dict[str, torch.Tensor]
    halves: int = 1

    def half(self, layer: int) -> LendingPool:
        """The part that a layer uses, by the layer's place among its rank's: neighbours don't share one."""
        first = layer % self.halves * self.slots
        return LendingPool(
            self.slots, {name: tensor[first : first + self.slots] for name, tensor in self.tensors.items()}
        )

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @classmethod
    def reserve(
        cls,
        weights: Mapping[str, torch.Tensor],
        slots_per_rank: int,
        budget_bytes: int = 0,
        available_bytes: int | None = None,
        other_bytes: int = 0,
        halves: int = 1,
    ) -> LendingPool:
        """A pool for experts shaped like `weights`, with so many slots in each half.

        budget_bytes > 0 decides the slots in place of slots_per_rank, and must hold at least one beside the other_bytes
        of resident replicas and workspace. The memory is touched at once, so that what sizes the KV cache sees it.
        Raises UnsupportedConfiguration if it is not to be had: on a host that is more than available_bytes (this rank's
        part of them), and no try is made, for trying would get some process killed.
        """
        local_experts = next(iter(weights.values())).shape[0]
        per_slot = halves * bytes_per_expert(weights)
        left_bytes = max(budget_bytes - other_bytes, 0)
        slots = min(left_bytes // per_slot, local_experts) if budget_bytes else slots_per_rank
        if budget_bytes and not slots:
            raise UnsupportedConfiguration(
                f"memory_budget_bytes={budget_bytes} is less than one slot of {per_slot} bytes and {other_bytes} bytes "
                f"of resident replicas and workspace: raise it to at least {per_slot + other_bytes}, or set it to 0 "
                "and slots_per_rank=0 to lend nothing",
                param="memory_budget_bytes",
            )
        if not budget_bytes and slots > local_experts:
            raise UnsupportedConfiguration(
                f"slots_per_rank={slots} is above the {local_experts} local experts of a rank: lower it",
                param="slots_per_rank",
            )
        key = "memory_budget_bytes" if budget_bytes else "slots_per_rank"
        pool = f"{key}={budget_bytes or slots}: the lending pool of {slots} slots x {per_slot} bytes per rank"
        if available_bytes is not None and slots * per_slot > available_bytes:
            raise UnsupportedConfiguration(
                f"{pool} is more than the {available_bytes} bytes that each rank on this machine can have: lower {key}",
                param=key,
            )
        try:
            tensors = {name: zeros_like_experts(tensor, halves * slots) for name, tensor in weights.items()}
        except (RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedConfiguration(f"{pool} can't be reserved: lower {key} ({reason})", param=key) from error
        return cls(slots, tensors, halves)
