"""The agent's way with recordings: what rank 0 leaves in the spool goes to the scheduler, part by part.

Both sides say by their files how far they are, so either may be killed at any time. What the scheduler no longer wants
is taken away once rank 0 is done with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llep.errors import LlepError, RecordingConflict, UnknownRecording
from llep.scheduler.archive import PARTIAL
from llep.scheduler.client import SchedulerClient
from llep.spool import Order, orders, read_end

logger = logging.getLogger("llep.agent")

LOOK_EVERY_S = 1.0
RETRY_S = 3.0
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 20.0


class Uploads:
    """Carries the recordings of one engine, oldest first, one chunk at a time."""

    def __init__(self, engine: str, client: SchedulerClient, base: Callable[[], Path | None]) -> None:
        """base: the spool; None while that is not known."""
        self._engine, self._client, self._base = engine, client, base
        self._said = ""

    async def run(self) -> None:
        """For ever."""
        while True:
            base = self._base()
            for folder, order in await asyncio.to_thread(orders, base, self._engine) if base else ():
                try:
                    await self._carry(folder, order)
                    self._said = ""
                except (LlepError, OSError) as error:
                    if str(error) != self._said:
                        self._said = str(error)
                        logger.warning("recording %s waits here: %s", order.id, error)
                    await asyncio.sleep(RETRY_S)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _carry(self, folder: Path, order: Order) -> None:
        """Bring what is new of one recording; when it has ended and all is there, take it away here."""
        end = read_end(folder)  # before the parts: what is whole by then is all of it
        try:
            have = await self._ask("recording_begun", order.id)
            for part in sorted(folder.glob("*.parquet")):
                while part.name not in have:
                    have = await self._send(order, part, have.get(part.name + PARTIAL, 0))
            if end is not None:
                await self._ask("recording_end", order.id, end.steps, end.problem)
        except (UnknownRecording, RecordingConflict) as error:
            logger.info("recording %s is not wanted any more: %s", order.id, error)
            end = end or read_end(folder)
        if end is not None:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _send(self, order: Order, part: Path, offset: int) -> dict[str, int]:
        with part.open("rb") as file:
            file.seek(offset)
            data = file.read(CHUNK_BYTES)
            is_whole = file.tell() == os.fstat(file.fileno()).st_size
        return await self._ask("recording_part", order.id, part.name, offset, data, is_whole)

    async def _ask(self, method: str, *arguments: object) -> dict[str, int]:
        answer: dict[str, int] = await self._client.call(method, self._engine, *arguments, timeout_s=TIMEOUT_S)
        return answer
