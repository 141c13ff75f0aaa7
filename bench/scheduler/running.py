"""A Ray and a scheduler of its own for a measurement, and how much of the machine a process takes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.scheduler.conftest import RayHead

NAMESPACE = "llep-bench"
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def ray_head(object_store_bytes: int = 400_000_000) -> Iterator[RayHead]:
    """A Ray in a folder of its own, ended by its process group, with LLEP_* set for whoever joins it."""
    with tempfile.TemporaryDirectory(prefix="llep-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ.update(RAY_AUTH_MODE="disabled", LLEP_RAY_NAMESPACE=NAMESPACE, LLEP_STATE_DIR=str(folder / "state"))
        head = RayHead(folder, object_store_bytes)
        os.environ["LLEP_RAY_ADDRESS"] = head.address
        try:
            head.start()
            yield head
        finally:
            head.kill()


@contextmanager
def scheduler(head: RayHead) -> Iterator[Any]:
    """The actor's handle, in a process that joins Ray."""
    import ray

    from llep.scheduler.client import connect_scheduler

    actor = connect_scheduler(head.address, NAMESPACE, Path(os.environ["LLEP_STATE_DIR"]))
    try:
        yield actor
    finally:
        ray.shutdown()


class Usage:
    """Processor time and memory of a process since this object was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cpu_s, self._started_s = self._cpu(), time.monotonic()

    @property
    def core_ratio(self) -> float:
        """Of one core."""
        return (self._cpu() - self._cpu_s) / (time.monotonic() - self._started_s)

    @property
    def resident_bytes(self) -> int:
        return self._status("VmRSS")

    @property
    def private_bytes(self) -> int:
        """Without pages shared with other processes, such as Ray's object store."""
        return self._status("RssAnon")

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def _status(self, key: str) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
