"""Counts of every step as a recording that llep.traces reads: written by rank 0 where LLEP_RECORD_DIR names a folder.

Counts are those that plans are made from. Tensor-parallel ranks all hold the same tokens: there the tokens are dealt
out evenly, as `llep simulate` does. Trouble with the disk ends the recording, never a forward pass.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llep.errors import LlepError, UnsupportedConfiguration
from llep.shapes import ModelShape, StepCounts, split_sources

logger = logging.getLogger("vllm.llep")

VARIABLE = "LLEP_RECORD_DIR"
MOST_BYTES = 512 << 20
PART_S = 5.0  # a part is whole after so long: the most that is lost when a worker is killed


def start_recording(
    name: str, shape: ModelShape, num_ranks: int, environ: Mapping[str, str] | None = None
) -> Recording | None:
    """A recording in the new folder LLEP_RECORD_DIR/name; None where the variable is not set.

    Raises UnsupportedConfiguration if there can't be one.
    """
    base = (os.environ if environ is None else environ).get(VARIABLE)
    if not base:
        return None
    folder = Path(base).expanduser().absolute() / name
    try:
        recording = Recording(folder, shape, num_ranks)
    except ModuleNotFoundError as error:
        raise UnsupportedConfiguration(
            f"{VARIABLE} is set, and recordings need the package {error.name}: pip install 'llep[planning]'"
        ) from None
    except (OSError, LlepError) as error:
        raise UnsupportedConfiguration(
            f"{VARIABLE}={base} can't be recorded to ({error}): name another folder, or unset it"
        ) from None
    logger.info("llep: recording the counts of every step in %s", folder)
    return recording


class Recording:
    """Puts layers together to steps and writes them, in the thread that runs the forward pass; a millisecond a step."""

    def __init__(self, folder: Path, shape: ModelShape, num_ranks: int, max_bytes: int = MOST_BYTES) -> None:
        from llep.traces import TraceWriter

        self.folder = folder
        self._shape = shape
        self._num_ranks = num_ranks
        self._writer: TraceWriter | None = TraceWriter(folder, shape, num_ranks, max_bytes=max_bytes)
        self._counts_LRE = np.zeros((shape.num_layers, num_ranks, shape.num_experts), dtype=np.int64)
        self._lock = threading.Lock()
        self._has_news = False
        threading.Thread(target=self._close_parts, name="llep-recording", daemon=True).start()
        atexit.register(self.finish)

    def add(self, step: int, phase: str, layer: int, counts_QE: npt.NDArray[np.int64]) -> None:
        """One layer of one step, in order; counts_QE: pairs of each source, one source where tokens are replicated."""
        self._counts_LRE[layer] = split_sources(counts_QE, self._num_ranks)
        if layer < self._shape.num_layers - 1:
            return
        with self._lock:
            if self._writer is None:
                return
            try:
                is_written = self._writer.append(StepCounts(step, phase, self._counts_LRE.copy()))
            except (OSError, LlepError) as error:
                self._stop(f"step {step} can't be written ({error})")
                return
            if is_written:
                self._has_news = True
            else:
                self._finish_part()
                self._stop("it is as large as it may be")

    def finish(self) -> None:
        """Make whole what has been written so far."""
        with self._lock:
            self._finish_part()

    def _close_parts(self) -> None:
        pause = threading.Event()
        while self._writer is not None:
            pause.wait(PART_S)
            self.finish()

    def _finish_part(self) -> None:
        if self._writer is None or not self._has_news:
            return
        self._has_news = False
        try:
            self._writer.finish_part()
        except OSError as error:
            self._stop(f"a part can't be finished ({error})")

    def _stop(self, why: str) -> None:
        logger.warning("llep: the recording in %s ends, serving goes on: %s", self.folder, why)
        self._writer = None
