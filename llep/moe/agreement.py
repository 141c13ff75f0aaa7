"""How the ranks of an EP group run exactly one revision, and know the same of each step.

A revision is all that an engine is told: settings, placement, recording. Before the first layer of a step every rank
says which one it holds. When all hold the same one, that revision is
live from this step on, on all of them; until then the last live one stays. A rank that has not received a revision
thus delays the switch, never the batch, and no step runs with two.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from llep.config import Settings, is_hot
from llep.errors import LlepError
from llep.messages import Directive, PlacementOrder, RecordingOrder
from llep.plan import Plan
from llep.planning.policy import Step

# What a rank says before a step: places in its header.
HEADER_SIZE = 9
STEP, HELD, DIGEST, LIVE, TOKENS, IS_DUMMY, IS_PREFILL, CLOCK_US, WEIGHTS = range(HEADER_SIZE)


# What a plan is made of, and the plan: equal on all ranks that planned from the same counts.
HELD_ALIKE = ("counts", "placements", "plans")


class RanksDisagree(LlepError):
    """Ranks of one EP group hold different settings under one revision, run different steps, or plan differently."""

    code = "ranks_disagree"


class Evidence:
    """What this rank planned from counts that all ranks hold, to be compared with the others'.

    where: the step and the layer. Nothing was planned yet: all digests are 0.
    """

    def __init__(
        self, where: str = "", counts_QE: npt.NDArray[np.int64] | None = None, plan: Plan | None = None
    ) -> None:
        self.where = where
        self._counts_QE, self._plan = counts_QE, plan

    @cached_property
    def digests(self) -> tuple[int, ...]:
        """One of each of HELD_ALIKE."""
        if self._counts_QE is None or self._plan is None:
            return (0,) * len(HELD_ALIKE)
        counts = np.dot(self._counts_QE.reshape(-1), _weights(self._counts_QE.size))  # wraps around by design
        return int(counts), hash(self._plan.placement), self._plan.digest()

    def compare(self, told_R3: npt.NDArray[np.int64]) -> None:
        """Raises RanksDisagree, on every rank alike, if one's digests are not the others'."""
        for what, told_R in zip(HELD_ALIKE, told_R3.T.tolist(), strict=True):
            if odd := odd_ranks(told_R):
                raise RanksDisagree(
                    f"EP rank {odd} holds other {what} than the others at {self.where or 'one layer'}: its memory or "
                    "its build of llep differs; restart the engine, and replace the machine if it happens again"
                )


@lru_cache(maxsize=16)
def _weights(size: int) -> npt.NDArray[np.int64]:
    """Odd numbers that all ranks draw alike: a sum by them differs where one count does; a tenth of a hash's time."""
    return np.random.default_rng(size).integers(-(2**62), 2**62, size, dtype=np.int64) * 2 + 1


def odd_ranks(told_R: Sequence[int]) -> str:
    """The ranks that tell something else than most do; '' if all tell the same."""
    usual = Counter(told_R).most_common(1)[0][0]
    return ", ".join(str(rank) for rank, told in enumerate(told_R) if told != usual)


@dataclass(frozen=True)
class Revision:
    number: int
    settings: Settings
    placement: PlacementOrder | None = None
    recording: RecordingOrder | None = None

    @cached_property
    def digest(self) -> int:
        told = {
            "settings": self.settings.dump(),
            "placement": repr(self.placement),
            "recording": repr(self.recording),
        }
        data = json.dumps(told, sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class AgreedSettings:
    """The revision that is live on this rank, and the newest one received. Offered by one thread, agreed by another.

    check_placement raises LlepError for an order that this engine can't follow: the same on every rank.
    """

    def __init__(self, settings: Settings, check_placement: Callable[[PlacementOrder], None] | None = None) -> None:
        self.check_placement = check_placement
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
            if directive.placement is not None and self.check_placement is not None:
                self.check_placement(directive.placement)
        except LlepError as error:
            self.last_error = f"revision {directive.revision}: {error.message}"
            return
        with self._lock:
            self.held = Revision(directive.revision, settings, directive.placement, directive.recording)
            self.last_error = ""

    def header(
        self, step: int, tokens: int, *, is_dummy: bool, is_prefill: bool, weights: int = 0
    ) -> npt.NDArray[np.int64]:
        """What this rank says before a step: [HEADER_SIZE] int64. weights: how often they were loaded anew."""
        with self._lock:
            said = self._said = self.held
        clock_us = time.monotonic_ns() // 1000
        return np.array(
            [step, said.number, said.digest, self.live.number, tokens, is_dummy, is_prefill, clock_us, weights],
            dtype=np.int64,
        )

    def agree(self, headers: npt.NDArray[np.int64]) -> None:
        """Switch to the revision that all ranks hold, if they do. Raises RanksDisagree, on every rank alike.

        headers: [R, HEADER_SIZE], of all ranks.
        """
        first = headers[0]
        for rank, header in enumerate(headers):
            if header[STEP] != first[STEP] or header[LIVE] != first[LIVE]:
                raise RanksDisagree(
                    f"EP rank {rank} is at step {header[STEP]} under revision {header[LIVE]}, rank 0 at step "
                    f"{first[STEP]} under revision {first[LIVE]}: restart the engine"
                )
        held = headers[:, HELD]
        if (held != held[0]).any():
            return
        if (headers[:, DIGEST] != headers[0, DIGEST]).any():
            rank = int((headers[:, DIGEST] != headers[0, DIGEST]).argmax())
            raise RanksDisagree(
                f"EP rank {rank} holds other settings than rank 0 under revision {held[0]}: give all ranks the same "
                "LLEP_* environment, LLEP_CONFIG file and --additional-config, then restart the engine"
            )
        if self.live.number != held[0]:
            self.live = self._said
            self.live_since_step = int(first[STEP])
            self.live_since_time_s = time.time()


def agreed_step(headers: npt.NDArray[np.int64], *, is_replicated: bool) -> tuple[Step, bool]:
    """What the ranks said, as one step, and whether it is real: only steps with real tokens are counted.

    Where tokens are replicated every rank says the same number; else they add up, and dummy ranks bring none.
    """
    is_dummy = headers[:, IS_DUMMY].astype(bool)
    is_real = not is_dummy.all()
    tokens = headers[:, TOKENS] * (~is_dummy | (not is_real))
    return Step(
        phase="prefill" if headers[:, IS_PREFILL].any() else "decode",
        tokens=int(tokens[0] if is_replicated else tokens.sum()),
    ), bool(is_real)


def _cold_values(settings: Settings) -> dict[str, object]:
    """What was fixed at start stays as it was."""
    return {key: value for key, value in settings.dump().items() if not is_hot(key)}
