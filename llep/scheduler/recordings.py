"""The part of the Scheduler that records: orders go out with a revision, parts come in from the agent, people read.

An order is part of what an engine is told, so that a restart of anything finds it again; its end is a revision too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from llep.config import Mode
from llep.errors import RecordingConflict, SettingsError, StoreUnavailable
from llep.messages import RecordingOrder
from llep.scheduler.archive import Archive, Recording
from llep.scheduler.core import Core
from llep.scheduler.journal import LLEP
from llep.scheduler.store import NewEvent
from llep.views import EngineState, EventKind, RecordingView

logger = logging.getLogger("llep.scheduler")

DEFAULT_DURATION_S, DEFAULT_STEPS_DURATION_S = 60.0, 3600.0  # without and with a number of steps
LONGEST_DURATION_S = 86400.0
MOST_STEPS = 10_000_000
LEAST_BYTES, MOST_BYTES = 1 << 20, 4 << 30
MOST_READ_BYTES = 8 << 20
END_GRACE_S = 60.0  # beyond its time, for the last parts to arrive
LONGEST_AUTHOR, LONGEST_REASON = 200, 2000


class Recordings(Core):
    """Records the counts of engines."""

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self._archive = Archive(self._folder)

    # What people call.

    async def recording_start(
        self,
        engine: str,
        author: str,
        duration_s: float | None = None,
        steps: int | None = None,
        max_bytes: int | None = None,
        reason: str = "",
    ) -> dict[str, Any]:
        """Order a recording from the engine's next step on; answers RecordingView.

        It ends by itself after duration_s (a minute, or an hour where steps are given), steps or bytes, whichever is
        first. Raises UnknownEngine, SettingsError, RecordingConflict, StoreUnavailable.
        """
        self._tick()
        _check_texts(author, reason)
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            raise SettingsError(f"steps={steps} is not between 1 and {MOST_STEPS}", param="steps")
        seconds = duration_s if duration_s is not None else DEFAULT_STEPS_DURATION_S if steps else DEFAULT_DURATION_S
        if not (math.isfinite(seconds) and 0 < seconds <= LONGEST_DURATION_S):
            raise SettingsError(
                f"duration_s={seconds} is not above 0 and at most {LONGEST_DURATION_S:.0f}", param="duration_s"
            )
        if max_bytes is not None and not LEAST_BYTES <= max_bytes <= MOST_BYTES:
            raise SettingsError(
                f"max_bytes={max_bytes} is not between {LEAST_BYTES} and {MOST_BYTES}", param="max_bytes"
            )
        known = self._engine(engine)
        if known.state is not EngineState.LIVE:
            raise RecordingConflict(f"engine {engine} is {known.state}: record when it is live", param="engine")
        settings = self._effective(self._journal.desired, [engine])[engine]
        if settings.mode is Mode.OFF:
            raise RecordingConflict(
                f"engine {engine} is in mode off, which counts nothing: `llep mode observe` counts, and lends nothing",
                param="engine",
            )
        running = next((one for one in self._archive.all() if one.engine == engine and one.is_active), None)
        if running is not None:
            raise RecordingConflict(
                f"engine {engine} is being recorded: stop it with `llep record stop {running.id}`", param="engine"
            )
        now_s = time.time()
        limit = max_bytes or int(settings.record_max_bytes)
        recording = Recording(
            id=f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now_s))}-{secrets.token_hex(3)}",
            engine=engine,
            state="ordered",
            author=author,
            reason=reason,
            created_s=now_s,
            until_s=now_s + seconds,
            duration_s=duration_s,
            steps_wanted=steps,
            max_bytes=limit,
        )
        self._archive.put(recording)
        order = RecordingOrder(id=recording.id, until_s=recording.until_s, max_steps=steps or 0, max_bytes=limit)
        try:
            self._order_recording(
                engine, order, f"recording {recording.id} of engine {engine} is ordered", author, reason
            )
        except StoreUnavailable:
            self._archive.delete(recording.id)
            raise
        return self._recording_view(recording)

    async def recording_stop(self, id: str, author: str) -> dict[str, Any]:
        """End a recording early; what was recorded until now is still on its way when this returns.

        Raises UnknownRecording, RecordingConflict if it has ended, StoreUnavailable.
        """
        self._tick()
        _check_texts(author, "")
        recording = self._archive.get(id)
        if not recording.is_active:
            raise RecordingConflict(f"recording {id} is {recording.state}: nothing to stop", param="id")
        self._withdraw_recording(recording, f"recording {id} is stopped", author)
        recording = self._put_recording(recording, until_s=min(recording.until_s, time.time()))
        return self._recording_view(recording)

    async def recordings(self) -> list[dict[str, Any]]:
        """RecordingView of all, newest first."""
        self._tick()
        return [self._recording_view(recording) for recording in self._archive.all()]

    async def recording(self, id: str) -> dict[str, Any]:
        """RecordingView. Raises UnknownRecording."""
        self._tick()
        return self._recording_view(self._archive.get(id))

    async def recording_delete(self, id: str, author: str) -> dict[str, Any]:
        """Forget a recording and its parts, stopping it if need be. Raises UnknownRecording, StoreUnavailable."""
        self._tick()
        _check_texts(author, "")
        recording = self._archive.get(id)
        self._withdraw_recording(recording, f"recording {id} is deleted", author)
        await asyncio.to_thread(self._archive.delete, id)
        message = f"recording {id} was deleted by {author}"
        self._journal.note(EventKind.RECORDING, message, engine=recording.engine or None, data={"recording": id})
        deleted = msgspec.structs.replace(recording, state="deleted", ended_s=recording.ended_s or time.time())
        return self._recording_view(deleted)

    async def recording_read(self, id: str, offset: int, size: int) -> bytes:
        """Bytes of the recording as one uncompressed tar of its parts; b"" from its end on. Raises UnknownRecording."""
        if offset < 0 or not 0 < size <= MOST_READ_BYTES:
            raise SettingsError(
                f"size={size} is not between 1 and {MOST_READ_BYTES}, or offset is below 0", param="size"
            )
        return await asyncio.to_thread(self._archive.read, id, offset, size)

    # What agents call.

    async def recording_begun(self, engine: str, id: str) -> dict[str, int]:
        """The agent has found the recording; answers which bytes of which part are here already.

        Raises UnknownRecording, also for one that has ended: then nobody wants more of it.
        """
        recording = self._archive.get(id)
        self._check_recorded(recording, engine)
        if recording.state == "ordered":
            with self._noting_trouble(recording):
                self._put_recording(recording, state="running")
        return self._archive.have(id)

    async def recording_part(
        self, engine: str, id: str, name: str, offset: int, data: bytes, is_whole: bool
    ) -> dict[str, int]:
        """Take bytes of a part; answers as recording_begun does. Raises UnknownRecording, RecordingConflict,
        StoreUnavailable."""
        recording = self._archive.get(id)
        self._check_recorded(recording, engine)
        with self._noting_trouble(recording):
            return await asyncio.to_thread(self._archive.append, id, name, offset, data, is_whole=is_whole)

    async def recording_end(self, engine: str, id: str, steps: int, problem: str) -> None:
        """No more will come. problem: '' if all is here. Raises UnknownRecording, StoreUnavailable."""
        recording = self._archive.get(id)
        self._check_recorded(recording, engine)
        if recording.is_active:
            self._end_recording(recording, steps, problem)

    # Inside.

    def _tick(self) -> None:
        super()._tick()
        now_s = time.time()
        for recording in self._archive.all():
            if recording.is_active and now_s > recording.until_s + END_GRACE_S:
                arrived = self._archive.part_bytes(recording.id)
                problem = recording.problem or (
                    "its end never arrived: the engine, its agent or the way to them is gone"
                    if arrived
                    else "nothing arrived: the engine ran no step, or rank 0 could not write (its log says why)"
                )
                try:
                    self._end_recording(recording, recording.steps, problem)
                except StoreUnavailable as error:
                    logger.warning("recording %s can't end yet: %s", recording.id, error.message)

    def _end_recording(self, recording: Recording, steps: int, problem: str) -> None:
        ended = "ended" if not problem else f"failed: {problem}"
        self._withdraw_recording(recording, f"recording {recording.id} {ended}", LLEP)
        state = "failed" if problem else "done"
        self._put_recording(recording, state=state, steps=steps, problem=problem[:LONGEST_REASON], ended_s=time.time())
        message = f"recording {recording.id} of engine {recording.engine} {ended}, {steps} steps"
        data = {"recording": recording.id, "steps": steps, "problem": problem}
        self._journal.note(EventKind.RECORDING, message, engine=recording.engine, data=data)

    def _withdraw_recording(self, recording: Recording, reason: str, author: str) -> None:
        """Tell the engine to record no more, if it is told to."""
        order = self._journal.desired.recordings.get(recording.engine)
        if order is not None and order.id == recording.id:
            self._order_recording(recording.engine, None, reason, author, "")

    def _order_recording(
        self, engine: str, order: RecordingOrder | None, message: str, author: str, reason: str
    ) -> None:
        changed = self._journal.desired.recorded(engine, order, self._next_revision())
        data = {"revision": changed.revision, "recording": order.id if order else None}
        event = NewEvent(
            kind=EventKind.RECORDING, message=message, time_s=time.time(), engine=engine, author=author, data=data
        )
        self._commit(changed, event, author=author, reason=reason or message, engines=[engine], patch={})

    def _put_recording(self, recording: Recording, **changes: Any) -> Recording:
        changed = msgspec.structs.replace(recording, **changes)
        self._archive.put(changed)
        return changed

    @contextmanager
    def _noting_trouble(self, recording: Recording) -> Iterator[None]:
        """A disk that fails is the recording's problem, until it ends."""
        try:
            yield
        except StoreUnavailable as error:
            if error.message != recording.problem:
                logger.warning("%s", error.message)
                self._archive.remember(msgspec.structs.replace(recording, problem=error.message))
            raise

    def _recording_view(self, recording: Recording) -> dict[str, Any]:
        view: RecordingView = self._archive.view(recording)
        return view.model_dump(mode="json")

    def _check_recorded(self, recording: Recording, engine: str) -> None:
        if recording.engine != engine:
            raise RecordingConflict(f"recording {recording.id} is of engine {recording.engine}, not {engine}")


def _check_texts(author: str, reason: str) -> None:
    for name, text, longest in (("author", author, LONGEST_AUTHOR), ("reason", reason, LONGEST_REASON)):
        if len(text) > longest:
            raise SettingsError(f"{name} has {len(text)} characters, above {longest}", param=name)
