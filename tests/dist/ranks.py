"""Real processes over gloo: one per rank; all end when one fails; what each found comes back."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

START_TIMEOUT_S = 120.0
# Ranks are forked from a process that has imported what they need: to do so anew takes each of them seconds.
IMPORTED_ONCE = ["torch.distributed", "llep.moe.layer", "llep.planning.policy", "pytest"]
_kept: list[Any] = []


def _run(rank: int, size: int, port: int, pipe: Connection, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Or all ranks would have their tensors at the same addresses, and nobody would notice one that reads at its own.
    _kept.extend(torch.empty(1 << number % 13) for number in range(2000 * rank))
    _kept.append(torch.empty(rank << 24))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        pipe.send(("ok", body(rank, size, *args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    with suppress(EOFError):
        pipe.recv()  # nothing comes: others may still ask this process, where the ranks met, who is to blame


def start_ranks(
    body: Callable[..., Any],
    size: int,
    *args: Any,
    timeout_s: float = START_TIMEOUT_S,
    lost: Collection[int] = (),
) -> list[Any]:
    """body(rank, size, *args) in `size` processes -> what each returned. Fails with the first traceback.

    Nobody waits for the ranks in `lost`, which are None.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe()
        process = context.Process(target=_run, args=(rank, size, port, sender, body, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: dict[int, Any] = dict.fromkeys(lost)
    try:
        while len(results) < size:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout_s)
            assert ready, f"ranks {sorted(set(range(size)) - set(results))} hang: nothing for {timeout_s} s"
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                status, value = pipe.recv()  # type: ignore[union-attr]
                assert status == "ok", f"rank {rank}:\n{value}"
                results[rank] = value
        return [results[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
            process.join()
