"""How the ranks of an EP group run exactly one revision of the settings, and know the same of each step.

Before the first layer of a step every rank says which revision it holds. When all hold the same one, that revision is
live from this step on, on all of them; until then the last live one stays. A rank that has not received a revision
thus delays the switch, never the batch, and no step runs with two.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llep.config import Settings, is_hot
from llep.errors import LlepError
from llep.messages import Directive
from llep.planning.policy import Step

HEADER_SIZE = 7


class RanksDisagree(LlepError):
    """Ranks of one EP group hold different settings under one revision, or run different steps."""

    code = "ranks_disagree"


@dataclass(frozen=True)
class Revision:
    number: int
    settings: Settings

    @cached_property
    def digest(self) -> int:
        data = json.dumps(self.settings.dump(), sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class AgreedSettings:
    """The revision that is live on this rank, and the newest one received. Offered by one thread, agreed by another."""

    def __init__(self, settings: Settings) -> None:
        self.live = self.held = Revision(0, settings)
        self.live_since_step = 0
        self.live_since_time_s = time.time()
        self.last_error = ""
        self._said = self.held  # what the last header said: the ranks agree on that, not on what came since
        self._lock = threading.Lock()

    def offer(self, directive: Directive) -> None:
        """Take a newer revision; an older or invalid one changes nothing, and what was wrong is kept in last_error."""
        if directive.revision <= self.held.number:
            return
        try:
            settings = Settings.parse({**directive.settings, **_cold_values(self.held.settings)})
        except LlepError as error:
            self.last_error = f"revision {directive.revision}: {error.message}"
            return
        with self._lock:
            self.held = Revision(directive.revision, settings)
            self.last_error = ""

    def header(self, step: int, tokens: int, *, is_dummy: bool, is_prefill: bool) -> npt.NDArray[np.int64]:
        """What this rank says before a step: [HEADER_SIZE] int64."""
        with self._lock:
            said = self._said = self.held
        return np.array(
            [step, said.number, said.digest, self.live.number, tokens, is_dummy, is_prefill], dtype=np.int64
        )

    def agree(self, headers: npt.NDArray[np.int64]) -> None:
        """Switch to the revision that all ranks hold, if they do. Raises RanksDisagree, on every rank alike.

        headers: [R, HEADER_SIZE], of all ranks.
        """
        first = headers[0]
        for rank, header in enumerate(headers):
            if header[0] != first[0] or header[3] != first[3]:
                raise RanksDisagree(
                    f"EP rank {rank} is at step {header[0]} under revision {header[3]}, rank 0 at step {first[0]} "
                    f"under revision {first[3]}: restart the engine"
                )
        held = headers[:, 1]
        if (held != held[0]).any():
            return
        if (headers[:, 2] != headers[0, 2]).any():
            rank = int((headers[:, 2] != headers[0, 2]).argmax())
            raise RanksDisagree(
                f"EP rank {rank} holds other settings than rank 0 under revision {held[0]}: give all ranks the same "
                "LLEP_* environment, LLEP_CONFIG file and --additional-config, then restart the engine"
            )
        if self.live.number != held[0]:
            self.live = self._said
            self.live_since_step = int(first[0])
            self.live_since_time_s = time.time()


def agreed_step(headers: npt.NDArray[np.int64], *, is_replicated: bool) -> tuple[Step, bool]:
    """What the ranks said, as one step, and whether it is real: only steps with real tokens are counted.

    Where tokens are replicated every rank says the same number; else they add up, and dummy ranks bring none.
    """
    is_dummy = headers[:, 5].astype(bool)
    is_real = not is_dummy.all()
    tokens = headers[:, 4] * (~is_dummy | (not is_real))
    return Step(
        phase="prefill" if headers[:, 6].any() else "decode",
        tokens=int(tokens[0] if is_replicated else tokens.sum()),
    ), bool(is_real)


def _cold_values(settings: Settings) -> dict[str, object]:
    """What was fixed at start stays as it was."""
    return {key: value for key, value in settings.dump().items() if not is_hot(key)}
