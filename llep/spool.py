"""Where rank 0 leaves the recordings that were ordered, for the agent to carry to the scheduler.

A folder per recording: order.json when it starts, part-*.parquet as they get whole, end.json when no more will come.
The agent takes the folder away once the scheduler has all of it. Files say it all, so both sides may be killed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from llep.scheduler.client import state_dir

FOLDER = "recording-spool"
ORDER, END = "order.json", "end.json"


class Order(msgspec.Struct, frozen=True):
    """Who records: an engine, and which of its lives."""

    id: str
    engine: str
    incarnation: str


class End(msgspec.Struct, frozen=True):
    """No more will come. problem: '' if it ended as it was meant to."""

    steps: int
    problem: str


Note = TypeVar("Note", Order, End)


def spool_dir(record_dir: str) -> Path:
    """The folder of all spooled recordings: the setting `record_dir`, or one in the state folder."""
    return Path(record_dir).expanduser().absolute() if record_dir else state_dir() / FOLDER


def write_note(path: Path, note: Order | End) -> None:
    """All of it or nothing, durable on return. Raises OSError."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(msgspec.json.encode(note))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_order(folder: Path) -> Order | None:
    return _read(folder / ORDER, Order)


def read_end(folder: Path) -> End | None:
    return _read(folder / END, End)


def orders(base: Path, engine: str) -> list[tuple[Path, Order]]:
    """Folders of this engine's recordings, oldest first."""
    try:
        folders = sorted(path for path in base.iterdir() if path.is_dir())
    except OSError:
        return []
    found = ((folder, read_order(folder)) for folder in folders)
    return [(folder, order) for folder, order in found if order is not None and order.engine == engine]


def _read(path: Path, kind: type[Note]) -> Note | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
