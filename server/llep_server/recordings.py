"""Recordings on their way from the scheduler: to clients in parts, and into a folder for the simulator."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llep.errors import RecordingConflict, StoreUnavailable
from llep.views import RecordingView
from llep_server.errors import Busy, InvalidRange, InvalidRecording
from llep_server.scheduler import Scheduler

CHUNK_BYTES = 1 << 20
MAX_DOWNLOADS = 8
COPY_PREFIX = "llep-recording-"
MEDIA_TYPE = "application/x-tar"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9._-]+\.parquet", re.ASCII)


class Downloads:
    """Lets so many clients fetch recordings at once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open = 0

    async def open(self, id: str, range_header: str | None, if_range: str | None) -> StreamingResponse:
        """The answer to GET .../data. Raises UnknownRecording, RecordingConflict, InvalidRange, Busy."""
        view = await self._scheduler.recording(id)
        size = data_bytes(view)
        etag = f'"{view.id}-{size}"'
        part = None if range_header is None or if_range not in (None, etag) else parse_range(range_header, size)
        if self._open >= MAX_DOWNLOADS:
            raise Busy(f"{self._open} recordings are being downloaded, no more at once: try again later")
        first, stop = (part.first, part.stop) if part else (0, size)
        headers = {
            **{"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(stop - first)},
            "Content-Disposition": f'attachment; filename="{_file_name(view.id)}"',
            **({"Content-Range": f"bytes {first}-{stop - 1}/{size}"} if part else {}),
        }
        self._open += 1
        return Download(
            read(self._scheduler, id, first, stop),
            206 if part else 200,
            headers,
            media_type=MEDIA_TYPE,
            on_end=self._end,
        )

    def _end(self) -> None:
        self._open -= 1


class Download(StreamingResponse):
    """Says when it is over, also where it never began."""

    def __init__(
        self, content: AsyncGenerator[bytes, None], *args: Any, on_end: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(content, *args, **kwargs)
        self._content = content
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._content):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes first..stop-1."""

    first: int
    stop: int


def parse_range(header: str, size: int) -> Part | None:
    """The one range that the header names; None, which is all of it, for what is not one range of bytes.

    Raises InvalidRange if it starts beyond the end.
    """
    found = _RANGE.fullmatch(header.strip().replace(" ", ""))
    if not found or found[1] == found[2] == "":
        return None
    if not found[1]:
        first, stop = max(size - int(found[2]), 0), size
    else:
        first, stop = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    if first >= size or stop <= first:
        raise InvalidRange(f"Range={header!r} is not within the recording's {size} bytes", param="Range")
    return Part(first, stop)


def data_bytes(view: RecordingView) -> int:
    """Bytes of the recording's tar. Raises RecordingConflict while there is none."""
    if not view.data_bytes:
        why = view.problem or "wait for it to end, or stop it"
        raise RecordingConflict(f"recording {view.id} is {view.state}, it has no data to fetch: {why}", param="id")
    return view.data_bytes


async def read(scheduler: Scheduler, id: str, first: int, stop: int) -> AsyncGenerator[bytes, None]:
    """The recording's bytes first..stop-1."""
    while first < stop:
        chunk = await scheduler.recording_read(id, first, min(CHUNK_BYTES, stop - first))
        if not chunk:
            raise RecordingConflict(f"recording {id} ended at byte {first} of {stop}: it was deleted", param="id")
        yield chunk
        first += len(chunk)


@asynccontextmanager
async def copy_of(scheduler: Scheduler, id: str) -> AsyncIterator[Path]:
    """A folder with the recording's Parquet files, there for as long as the block lasts. Raises what fetch does."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=COPY_PREFIX))
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StoreUnavailable(f"no folder for a copy of recording {id} can be made: {error.strerror}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # ends with the process, however that ends
        await fetch(scheduler, id, folder)
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        os.close(held)


def sweep_copies() -> None:
    """Remove the copies of control planes that were killed; those of others that live are held."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPY_PREFIX}*"):
        with suppress(OSError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


async def fetch(scheduler: Scheduler, id: str, folder: Path) -> None:
    """Put the recording's Parquet files into the folder. Raises what read does, InvalidRecording, StoreUnavailable."""
    size = data_bytes(await scheduler.recording(id))
    archive = folder / "recording.tar"
    try:
        with archive.open("wb") as file:
            async with aclosing(read(scheduler, id, 0, size)) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(unpack, archive, folder)
        archive.unlink()
    except OSError as error:
        raise StoreUnavailable(
            f"the control plane can't keep a copy of recording {id}, {size} bytes, in {folder.parent}: {error.strerror}"
        ) from None


def unpack(archive: Path, folder: Path) -> None:
    """The archive's Parquet files into the folder, whatever paths they have in it. Raises InvalidRecording."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if member.isfile() and _PART.fullmatch(name) else None
                if content is not None:
                    with (folder / name).open("wb") as file:
                        while chunk := content.read(CHUNK_BYTES):
                            file.write(chunk)
    except tarfile.TarError as error:
        raise InvalidRecording(f"the recording's archive can't be read: {error}") from None


def _file_name(id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", id) + ".tar"
