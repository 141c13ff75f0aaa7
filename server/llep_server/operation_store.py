"""Operations on disk, a file each, so that a control plane that was killed still knows them."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from llep.errors import StoreUnavailable
from llep_server.schemas import Operation

logger = logging.getLogger(__name__)

FOLDER = "operations"


class OperationStore:
    """The state folder's operations, which one control plane at a time keeps there.

    A second one on the same folder, or one that can't write there, keeps nothing, and its log says so.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER
        self._held: TextIO | None = None

    def open(self) -> list[Operation]:
        """Take the folder and return what is in it, oldest first."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = (self._folder / "lock").open("w")
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            self.close()
            why = "another control plane uses it" if isinstance(error, BlockingIOError) else error.strerror
            logger.warning("operations are gone when this control plane ends: %s: %s", self._folder, why)
            return []
        for half_written in self._folder.glob("*.tmp"):
            half_written.unlink(missing_ok=True)
        found = [operation for path in self._folder.glob("*.json") if (operation := _read(path))]
        return sorted(found, key=lambda operation: operation.created_s)

    def put(self, operation: Operation) -> None:
        """Keep it as it is now, whatever happens next. Raises StoreUnavailable."""
        if self._held is None:
            return
        path = self._path(operation.id)
        half_written = path.with_suffix(".tmp")
        try:
            with half_written.open("w") as file:
                file.write(operation.model_dump_json())
                file.flush()
                os.fsync(file.fileno())
            half_written.replace(path)
        except OSError as error:
            with suppress(OSError):
                half_written.unlink(missing_ok=True)
            raise StoreUnavailable(f"operations can't be kept in {self._folder}: {error.strerror}") from None

    def drop(self, id: str) -> None:
        if self._held is not None:
            self._path(id).unlink(missing_ok=True)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"


def _read(path: Path) -> Operation | None:
    try:
        return Operation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        logger.warning("%s is no operation that this version can read, and is left out: %s", path, error)
        return None
