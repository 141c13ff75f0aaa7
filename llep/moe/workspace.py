"""Room for rows on their way through a layer: reserved once, shared by all layers, the same whatever the skew."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

# Tokens of each source that travel at a time: enough to fill links and GEMMs, few enough to bound what is reserved.
MOST_TOKENS_AT_A_TIME = 4096
# Pairs computed at a time: on a CPU few stay in its caches (2 to 4% faster by bench.serving), GPUs like large GEMMs.
MOST_ROWS_AT_A_TIME = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Buffers:
    """inputs [chunk_rows, H] is what experts compute at a time; sent, received and sums [wire_rows, H] are token rows
    to other ranks, from them, and the weighted sums that go back."""

    inputs: torch.Tensor
    sent: torch.Tensor
    received: torch.Tensor
    sums: torch.Tensor


@dataclass(slots=True)
class Workspace:
    """chunk_rows: the most pairs computed at a time; wire_rows: the most token rows sent, or received, at a time.

    A batch that needs more is computed in parts. The tensors are made when the first batch shows their width and type,
    in vLLM that is the run that sizes the KV cache, and stay.
    """

    chunk_rows: int
    wire_rows: int
    _buffers: dict[tuple[int, torch.dtype, torch.device], Buffers] = field(default_factory=dict)
    _pinned: torch.Tensor | None = None

    @classmethod
    def for_batches(
        cls, tokens: int, top_k: int, ep_size: int, device: torch.device, *, is_replicated: bool
    ) -> Workspace:
        """What a balanced batch of so many tokens per source needs, or less for a very large one: then it is parted."""
        balanced_pairs = -(-tokens * top_k // ep_size) if is_replicated else tokens * top_k
        at_a_time = min(tokens, MOST_TOKENS_AT_A_TIME)
        per_peer = min(at_a_time, -(-at_a_time * top_k // ep_size))
        wire_rows = 0 if is_replicated else (ep_size - 1) * max(per_peer, 1)
        return cls(max(min(balanced_pairs, MOST_ROWS_AT_A_TIME[device.type]), 1), wire_rows)

    def tokens_at_a_time(self, ep_size: int) -> int:
        """Tokens of each source whose rows fit, wherever they go. Raises ValueError if not even one's do."""
        if self.wire_rows < ep_size - 1:
            raise ValueError(f"wire_rows={self.wire_rows} holds no row of each of {ep_size - 1} other ranks: raise it")
        return self.wire_rows // (ep_size - 1)

    def buffers(self, hidden_TH: torch.Tensor) -> Buffers:
        """Those for rows like these."""
        key = (hidden_TH.shape[1], hidden_TH.dtype, hidden_TH.device)
        if key not in self._buffers:
            # zeros, not empty: untouched pages are not counted as used memory.
            sizes = (self.chunk_rows, self.wire_rows, self.wire_rows, self.wire_rows)
            self._buffers[key] = Buffers(*(hidden_TH.new_zeros((size, hidden_TH.shape[1])) for size in sizes))
        return self._buffers[key]

    def on_host(self, counts: torch.Tensor) -> npt.NDArray[np.int64]:
        """A copy of int64 counts on the host: from a device by way of pinned memory, and waited for."""
        if not counts.is_cuda:
            return counts.numpy()
        if self._pinned is None or self._pinned.numel() < counts.numel():
            self._pinned = torch.empty(counts.numel(), dtype=torch.int64, pin_memory=True)
        landing = self._pinned[: counts.numel()].view(counts.shape)
        landing.copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(counts.device))
        copied.synchronize()
        return landing.numpy().copy()

    def bytes_for(self, hidden: int, dtype: torch.dtype) -> int:
        """What rows of that width and type need."""
        return (self.chunk_rows + 3 * self.wire_rows) * hidden * dtype.itemsize

    @property
    def bytes(self) -> int:
        """Reserved so far."""
        return sum(
            tensor.numel() * tensor.element_size()
            for buffers in self._buffers.values()
            for tensor in (buffers.inputs, buffers.sent, buffers.received, buffers.sums)
        )
