"""Reading the memory of another process of this machine: weights that are lent so cost one copy, by who borrows them.

Linux's process_vm_readv. A kernel, a container or a user who may not leaves weights to the network between ranks.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from functools import cache
from typing import Any

import torch


class _Stretch(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def read(pid: int, address: int, into: torch.Tensor) -> None:
    """Fill `into`, contiguous and on the host, from another process's memory. Raises OSError where that fails."""
    size, done = into.numel() * into.element_size(), 0
    while done < size:
        local, remote = _Stretch(into.data_ptr() + done, size - done), _Stretch(address + done, size - done)
        count = _process_vm_readv()(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count <= 0:
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: memory of process {pid}")
        done += count


@cache
def _process_vm_readv() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError) as error:
        raise OSError("this system has no process_vm_readv") from error
    function.restype = ctypes.c_ssize_t
    word = ctypes.c_ulong
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, word, ctypes.c_void_p, word, word)
    return function


class Mark:
    """A random number somewhere in this process's memory, and where: who can read it there shares its machine."""

    def __init__(self) -> None:
        self._number = torch.tensor([secrets.randbits(62)], dtype=torch.int64)

    @property
    def row(self) -> torch.Tensor:
        """[3] int64: process, address, number."""
        return torch.tensor([os.getpid(), self._number.data_ptr(), int(self._number)], dtype=torch.int64)


def is_readable(row: torch.Tensor) -> bool:
    """Whether the process that made this row of a Mark can be read from here."""
    pid, address, number = map(int, row.tolist())
    found = torch.zeros(1, dtype=torch.int64)
    try:
        read(pid, address, found)
    except OSError:
        return False
    return int(found) == number
