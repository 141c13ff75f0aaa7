"""Recordings in the scheduler's state folder: a folder each, of Parquet parts and a description. Bounded; no index but
the files themselves.

`read` gives a recording as one uncompressed tar that exists nowhere: headers are made as they are asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from llep.errors import RecordingConflict, StoreUnavailable, UnknownRecording
from llep.views import RecordingView

FOLDER = "recordings"
DESCRIPTION = "recording.json"
PARTIAL = ".partial"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
PART = re.compile(r"(part|transitions)-\d{6}\.parquet", re.ASCII)
MOST_RECORDINGS = 64
MOST_BYTES = 8 << 30
RESERVED_BYTES = 256 << 20  # of the disk, left to the scheduler's own state: it must not fill up with recordings
TAR_BLOCK = 512
ACTIVE = ("ordered", "running")


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a recording beside its parts."""

    id: str
    engine: str
    state: str  # ordered, running, done, failed, deleted
    author: str
    reason: str
    created_s: float
    until_s: float
    duration_s: float | None
    steps_wanted: int | None
    max_bytes: int
    ended_s: float | None = None
    steps: int = 0
    problem: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


class Archive:
    """The recordings of one state folder. Methods raise UnknownRecording, and StoreUnavailable if the disk fails."""

    def __init__(
        self,
        state_dir: Path,
        *,
        most_recordings: int = MOST_RECORDINGS,
        most_bytes: int = MOST_BYTES,
        reserved_bytes: int = RESERVED_BYTES,
    ) -> None:
        self._base = state_dir / FOLDER
        self._most_recordings, self._most_bytes, self._reserved_bytes = most_recordings, most_bytes, reserved_bytes
        self._known = {found.id: found for found in self._found()}

    def all(self) -> list[Recording]:
        """Newest first."""
        return sorted(self._known.values(), key=lambda one: (one.created_s, one.id), reverse=True)

    def get(self, id: str) -> Recording:
        if id not in self._known:
            raise UnknownRecording(f"no recording {id!r}: `llep record list` lists them", param="id")
        return self._known[id]

    def put(self, recording: Recording) -> None:
        """Keep a new recording, or what has changed about one; durable on return."""
        is_new = recording.id not in self._known
        if is_new:
            self._make_room()
        try:
            folder = self._base / recording.id
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = folder / (DESCRIPTION + PARTIAL)
            with unfinished.open("wb") as file:
                file.write(msgspec.json.encode(recording))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(folder / DESCRIPTION)
        except OSError as error:
            raise _unavailable(self._base, error) from None
        self._known[recording.id] = recording

    def remember(self, recording: Recording) -> None:
        """What has changed about a recording, for as long as this process lives: the disk may fail."""
        self._known[recording.id] = recording

    def delete(self, id: str) -> None:
        self.get(id)
        try:
            shutil.rmtree(self._base / id)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unavailable(self._base, error) from None
        del self._known[id]

    def have(self, id: str) -> dict[str, int]:
        """Bytes of each part that is here, by its name; of one that isn't whole yet, by NAME.partial."""
        self.get(id)
        return {path.name: size for path, size in self._files(id)}

    def append(self, id: str, name: str, offset: int, data: bytes, *, is_whole: bool) -> dict[str, int]:
        """Add bytes to a part where it ends; those that are here already are left out. Returns `have`.

        A part that is whole stays as it is. Raises RecordingConflict for a gap, a bad name, or more than there is room.
        """
        recording = self.get(id)
        if not PART.fullmatch(name):
            raise RecordingConflict(f"{name!r} is not the name of a recording's part", param="name")
        path = self._base / id / name
        partial = path.with_name(name + PARTIAL)
        if path.exists():
            return self.have(id)
        size = partial.stat().st_size if partial.exists() else 0
        if offset > size:
            raise RecordingConflict(f"{name} has {size} bytes here, bytes from {offset} on leave a gap", param="offset")
        new = data[size - offset :]
        if (
            self.part_bytes(id) + len(new) > 2 * recording.max_bytes
            or self._total_bytes() + len(new) > self._most_bytes
        ):
            raise RecordingConflict(f"there is no room for more of recording {id}", param="data")
        self._check_disk(len(new))
        try:
            with partial.open("ab") as file:
                file.write(new)
                if is_whole:
                    file.flush()
                    os.fsync(file.fileno())
            if is_whole:
                partial.replace(path)
        except OSError as error:
            raise _unavailable(self._base, error) from None
        return self.have(id)

    def part_bytes(self, id: str) -> int:
        """Of whole parts."""
        return sum(size for path, size in self._files(id) if PART.fullmatch(path.name))

    def read(self, id: str, offset: int, size: int) -> bytes:
        """Bytes of the recording's tar; b"" from its end on. The same ones always once the recording has ended."""
        found, end = [], offset + size
        try:
            for start, stop, piece in self._tar(self.get(id)):
                if stop <= offset or start >= end:
                    continue
                first, last = max(offset - start, 0), min(end, stop) - start
                found.append(_slice(piece, first, last))
        except OSError as error:
            raise _unavailable(self._base, error) from None
        return b"".join(found)

    def tar_bytes(self, id: str) -> int:
        return max(stop for _, stop, _ in self._tar(self.get(id)))

    def view(self, recording: Recording) -> RecordingView:
        size = 0 if recording.state == "deleted" else self.part_bytes(recording.id)
        return RecordingView(
            id=recording.id,
            engine=recording.engine,
            state=recording.state,
            author=recording.author,
            reason=recording.reason,
            created_s=recording.created_s,
            ended_s=recording.ended_s,
            duration_s=recording.duration_s,
            steps_wanted=recording.steps_wanted,
            steps=recording.steps,
            bytes=size,
            problem=recording.problem,
            data_bytes=self.tar_bytes(recording.id) if size and not recording.is_active else 0,
        )

    def _tar(self, recording: Recording) -> Iterator[tuple[int, int, bytes | Path]]:
        """(start, stop, bytes or the file that holds them) of each piece, in order."""
        at = 0
        for path, size in self._files(recording.id):
            if not PART.fullmatch(path.name):
                continue
            header = tarfile.TarInfo(f"{recording.id}/{path.name}")
            header.size, header.mtime = size, int(recording.created_s)
            for piece, length in (
                (header.tobuf(tarfile.USTAR_FORMAT), TAR_BLOCK),
                (path, size),
                (bytes(-size % TAR_BLOCK), -size % TAR_BLOCK),
            ):
                yield at, at + length, piece
                at += length
        yield at, at + 2 * TAR_BLOCK, bytes(2 * TAR_BLOCK)

    def _files(self, id: str) -> list[tuple[Path, int]]:
        """Parts by name, whole or not, with their bytes."""
        try:
            paths = sorted((self._base / id).iterdir())
            return [(path, path.stat().st_size) for path in paths if PART.fullmatch(path.name.removesuffix(PARTIAL))]
        except FileNotFoundError:
            return []  # deleted meanwhile

    def _check_disk(self, more_bytes: int) -> None:
        free_bytes = self._free_bytes()
        if free_bytes - more_bytes < self._reserved_bytes:
            raise RecordingConflict(
                f"the disk of {self._base} has {free_bytes >> 20} MiB free, of which {self._reserved_bytes >> 20} are "
                "kept for the scheduler's state: free the disk, or delete recordings (on the page, or with "
                "DELETE /v1/recordings/ID)"
            )

    def _free_bytes(self) -> int:
        try:
            return shutil.disk_usage(self._base if self._base.exists() else self._base.parent).free
        except OSError as error:
            raise _unavailable(self._base, error) from None

    def _total_bytes(self) -> int:
        return sum(size for id in self._known for _, size in self._files(id))

    def _make_room(self) -> None:
        """For one more: the oldest that have ended go where there are too many or they are too large."""
        ended = [one for one in reversed(self.all()) if not one.is_active]
        while ended and (len(self._known) >= self._most_recordings or self._total_bytes() > self._most_bytes // 2):
            self.delete(ended.pop(0).id)
        self._check_disk(0)
        if len(self._known) >= self._most_recordings:
            raise RecordingConflict(
                f"{len(self._known)} recordings are under way, no more at once: stop some with `llep record stop`"
            )

    def _found(self) -> Iterator[Recording]:
        """What is on disk. A folder whose description is lost is shown, so that somebody can fetch or delete it."""
        try:
            folders = [path for path in self._base.iterdir() if path.is_dir() and ID.fullmatch(path.name)]
        except OSError:
            return
        for folder in folders:
            try:
                found = msgspec.json.decode((folder / DESCRIPTION).read_bytes(), type=Recording)
                yield msgspec.structs.replace(found, id=folder.name)
            except (OSError, msgspec.MsgspecError) as error:
                made_s = folder.stat().st_mtime
                yield Recording(
                    id=folder.name,
                    engine="",
                    state="failed",
                    author="",
                    reason="",
                    created_s=made_s,
                    until_s=made_s,
                    duration_s=None,
                    steps_wanted=None,
                    max_bytes=0,
                    ended_s=made_s,
                    problem=f"its description can't be read: {error}",
                )


def _slice(piece: bytes | Path, first: int, last: int) -> bytes:
    if isinstance(piece, bytes):
        return piece[first:last]
    with piece.open("rb") as file:
        file.seek(first)
        return file.read(last - first)


def _unavailable(base: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"recordings in {base} can't be kept: {error}; free or repair the disk")
