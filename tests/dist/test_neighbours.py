"""Another process's memory: found by a mark, read whole, refused where it isn't there any more."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from llep.moe.neighbours import Mark, is_readable, read


def show(pipe: Connection) -> None:
    torch.set_num_threads(1)
    mark, values = Mark(), torch.arange(3_000_000, dtype=torch.int32)
    pipe.send((mark.row.tolist(), values.data_ptr()))
    pipe.recv()


def test_memory_of_a_process_is_read_while_it_lives() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=show, args=(there,), daemon=True)
    process.start()
    row, address = here.recv()
    mark = torch.tensor(row)
    assert is_readable(mark)
    assert not is_readable(mark + torch.tensor([0, 0, 1])), "another number there: another process, or machine"
    assert not is_readable(torch.tensor([row[0], 8, row[2]])), "no memory at that address"

    values = torch.zeros(3_000_000, dtype=torch.int32)
    read(row[0], address, values)
    assert torch.equal(values, torch.arange(3_000_000, dtype=torch.int32))

    process.kill()
    process.join()
    assert not is_readable(mark)
    with pytest.raises(OSError, match=f"memory of process {row[0]}"):
        read(row[0], address, values)
