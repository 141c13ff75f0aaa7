"""Counts of every step as recordings that llep.traces reads, written by rank 0: those ordered, or all from the start.

Counts are those that plans are made from. Tensor-parallel ranks all hold the same tokens: there the tokens are dealt
out evenly, as `llep simulate` does. Trouble with the disk ends a recording, never a forward pass.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llep.errors import LlepError, UnsupportedConfiguration
from llep.messages import RecordingOrder
from llep.shapes import ModelShape, StepCounts, split_sources
from llep.spool import END, ORDER, End, Order, orders, read_end, write_note

if TYPE_CHECKING:
    from llep.traces import TraceWriter

logger = logging.getLogger("vllm.llep")

FROM_START = "LLEP_RECORD_FROM_START"
PART_S = 5.0  # a part is whole after so long: the most that is lost when a worker is killed
PART_ROWS = 4_000_000
MOST_WAITING_BYTES = 64 << 20  # of steps between the forward pass and the disk
MISSING = "recordings need the package {name} beside vLLM: pip install 'llep[planning]'"


class Recorder:
    """What rank 0 records: at most one recording that was ordered, and one from the start where that is asked for."""

    def __init__(self, base: Path, engine: str, incarnation: str, shape: ModelShape, num_ranks: int) -> None:
        """base: the spool. What a former life of this engine left unended there is ended."""
        self._base, self._engine, self._incarnation = base, engine, incarnation
        self._shape, self._num_ranks = shape, num_ranks
        self._ordered: Recording | None = None
        self._from_start: Recording | None = None
        self._id = ""
        for folder, order in orders(base, engine):
            if order.incarnation != incarnation and read_end(folder) is None:
                with contextlib.suppress(OSError):
                    write_note(folder / END, End(0, "the engine ended before the recording did"))

    def record_from_start(self, most_bytes: int, environ: Mapping[str, str] | None = None) -> None:
        """Record everything in a folder of its own below the base, if LLEP_RECORD_FROM_START says so.

        Raises UnsupportedConfiguration if that can't be done.
        """
        if (os.environ if environ is None else environ).get(FROM_START, "") in ("", "0"):
            return
        folder = self._base / f"{self._engine}-{self._incarnation}"
        try:
            self._from_start = Recording(folder, self._shape, self._num_ranks, max_bytes=most_bytes)
        except ModuleNotFoundError as error:
            raise UnsupportedConfiguration(
                f"{FROM_START} is set, and {MISSING.format(name=error.name)}", param=FROM_START
            ) from None
        except (OSError, LlepError) as error:
            raise UnsupportedConfiguration(
                f"{folder} can't be recorded to ({error}): set record_dir to another folder, or unset {FROM_START}",
                param="record_dir",
            ) from None
        logger.info("llep: recording the counts of every step in %s", folder)

    def follow(self, order: RecordingOrder | None, most_bytes: int) -> None:
        """Record what is ordered from this step on; None: nothing. Called whenever a revision goes live."""
        if order is not None and order.id == self._id:
            return
        if self._ordered is not None:
            self._ordered.stop("another was ordered" if order else "it was stopped")
            self._ordered = None
        self._id = order.id if order else ""
        if order is not None and order.until_s > time.time():
            self._ordered = self._started(order, most_bytes)

    def release(self, held: RecordingOrder | None) -> None:
        """End what the newest revision no longer orders, live or not: an engine without traffic makes no step in which
        it could go live. For another thread than the one that follows."""
        ordered = self._ordered
        if ordered is not None and (held is None or held.id != self._id):
            ordered.stop("it was stopped")

    def add(self, step: int, phase: str, layer: int, counts_QE: npt.NDArray[np.int64]) -> None:
        """One layer of one step, in order; counts_QE: pairs of each source, one source where tokens are replicated."""
        for recording in (self._ordered, self._from_start):
            if recording is not None and recording.is_open:
                recording.add(step, phase, layer, counts_QE)

    def _started(self, order: RecordingOrder, most_bytes: int) -> Recording | None:
        folder = self._base / order.id
        try:
            if folder.exists():
                return None  # begun, and ended by now, in a former life of this engine
            folder.mkdir(mode=0o700, parents=True)
            write_note(folder / ORDER, Order(order.id, self._engine, self._incarnation))
        except OSError as error:
            logger.warning("llep: recording %s can't be written, serving goes on: %s", order.id, error)
            return None
        limit = min(order.max_bytes or most_bytes, most_bytes)
        try:
            recording = Recording(
                folder,
                self._shape,
                self._num_ranks,
                max_bytes=limit,
                max_steps=order.max_steps or None,
                until_s=order.until_s,
                says_end=True,
            )
        except ModuleNotFoundError as error:
            _fail(folder, MISSING.format(name=error.name))
            return None
        except (OSError, LlepError) as error:
            _fail(folder, str(error))
            return None
        logger.info("llep: recording %s begins in %s", order.id, folder)
        return recording


def _fail(folder: Path, why: str) -> None:
    logger.warning("llep: the recording in %s does not begin, serving goes on: %s", folder, why)
    with contextlib.suppress(OSError):
        write_note(folder / END, End(0, why))


class Recording:
    """Puts layers together to steps in the thread that runs the forward pass, and writes them in one of its own.

    Ends by itself after max_bytes on disk, max_steps steps, or at until_s (unix time). With says_end it leaves a note
    of how it ended. Steps for which the disk is too slow are left out, and counted in the log.
    """

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        num_ranks: int,
        *,
        max_bytes: int,
        max_steps: int | None = None,
        until_s: float | None = None,
        says_end: bool = False,
    ) -> None:
        from llep.traces import TraceWriter

        self.folder = folder
        self.steps = self.skipped = 0
        self._shape, self._num_ranks = shape, num_ranks
        self._max_steps, self._until_s, self._says_end = max_steps, until_s, says_end
        self._writer: TraceWriter | None = TraceWriter(
            folder, shape, num_ranks, max_bytes=max_bytes, part_rows=PART_ROWS, beside=(ORDER,)
        )
        self._counts_LRE = np.zeros((shape.num_layers, num_ranks, shape.num_experts), dtype=np.int64)
        self._next_layer = 0  # a recording may begin in the middle of a step, and skips what is left of it
        self._waiting: deque[StepCounts] = deque()
        self._most_waiting = max(MOST_WAITING_BYTES // self._counts_LRE.nbytes, 4)
        self._lock = threading.Lock()  # of the writer and all that is about it
        self._has_news = False
        self._stop_reason = ""
        self._wakes = threading.Event()
        self._end: End | None = None
        threading.Thread(target=self._keep, name="llep-recording", daemon=True).start()
        atexit.register(self.finish)

    @property
    def is_open(self) -> bool:
        return self._writer is not None and not self._stop_reason

    def add(self, step: int, phase: str, layer: int, counts_QE: npt.NDArray[np.int64]) -> None:
        """One layer of one step, in order."""
        if layer not in (0, self._next_layer):
            return
        self._counts_LRE[layer] = split_sources(counts_QE, self._num_ranks)
        self._next_layer = layer + 1
        if self._next_layer < self._shape.num_layers:
            return
        self._next_layer = 0
        if len(self._waiting) >= self._most_waiting:
            self.skipped += 1
            return
        self._waiting.append(StepCounts(step, phase, self._counts_LRE.copy()))
        self._wakes.set()

    def finish(self) -> None:
        """Make whole all that has been added so far."""
        with self._lock:
            self._write_waiting()
            self._finish_part()

    def stop(self, why: str) -> None:
        """End it, as it was meant to, after what has been added."""
        self._stop_reason = why
        self._wakes.set()

    def _keep(self) -> None:
        """Writes steps, closes parts, ends the recording in time, and leaves the note however long the disk refuses."""
        next_part_s = time.monotonic() + PART_S
        while self._writer is not None or (self._says_end and self._end is not None):
            self._wakes.wait(PART_S if self._until_s is None else min(PART_S, max(self._until_s - time.time(), 0.01)))
            self._wakes.clear()
            with self._lock:
                self._write_waiting()
                if time.monotonic() >= next_part_s:
                    next_part_s = time.monotonic() + PART_S
                    self._finish_part()
                if self._stop_reason:
                    self._close(self._stop_reason)
                elif self._until_s is not None and time.time() >= self._until_s:
                    self._close("its time is over")
            self._write_end()

    def _write_waiting(self) -> None:
        """The caller holds the lock."""
        while self._waiting and self._writer is not None:
            step = self._waiting.popleft()
            try:
                is_written = self._writer.append(step)
            except (OSError, LlepError) as error:
                self._close(f"step {step.step} can't be written ({error})", is_problem=True)
                return
            if not is_written:
                self._close("it is as large as it may be")
                return
            self._has_news = True
            self.steps += 1
            if self.steps == self._max_steps:
                self._close(f"{self.steps} steps were wanted")

    def _write_end(self) -> None:
        if self._end is None or not self._says_end:
            return
        try:
            write_note(self.folder / END, self._end)
        except FileNotFoundError:
            pass  # somebody took the folder away
        except OSError as error:
            logger.warning("llep: the end of the recording in %s can't be written yet: %s", self.folder, error)
            time.sleep(PART_S)
            return
        self._end = None

    def _finish_part(self) -> None:
        if self._writer is None or not self._has_news:
            return
        self._has_news = False
        try:
            self._writer.finish_part()
        except OSError as error:
            self._close(f"a part can't be finished ({error})", is_problem=True)

    def _close(self, why: str, *, is_problem: bool = False) -> None:
        """No more will be written. The caller holds the lock."""
        if self._writer is None:
            return
        if not is_problem:
            self._finish_part()
        if self._writer is None:
            return  # that failed, and has been said
        self._end = End(self.steps, why if is_problem else "")  # first: without a writer and an end, all is over
        self._writer = None
        log = logger.warning if is_problem else logger.info
        left_out = f", {self.skipped} were left out" if self.skipped else ""
        log(
            "llep: the recording in %s ends after %d steps%s, serving goes on: %s",
            self.folder,
            self.steps,
            left_out,
            why,
        )
