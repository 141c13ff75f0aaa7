"""What all parts of the Scheduler share: what is known of engines, what lasts, how changes are committed, time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llep import __version__
from llep.config import Settings
from llep.errors import SettingsError, StoreUnavailable, UnknownEngine
from llep.scheduler.admit import Refused
from llep.scheduler.desired import Desired, difference
from llep.scheduler.journal import LLEP, Journal
from llep.scheduler.store import KnownEngine, NewDecision, NewEvent, StoredPlacement
from llep.scheduler.windows import Change, Engine, Windows
from llep.views import EngineState, EventKind

logger = logging.getLogger("llep.scheduler")

TICK_S = 1.0
REMEMBER_EVERY_S = 60.0
CLOCK_JUMP_S = 2.0  # between two ticks; less is the clock being corrected
REPEATED_EVENT_EVERY_S = 60.0
MOST_REPEATED_KINDS = 1000
HEAR_FIRST_S = 3.0
MOST_AWAY = 200  # engines that are gone, whose own settings and placements wait for them
MOST_ANSWERED = 1000  # rows of one answer


class Signal:
    """Wakes everybody who waits, each time it fires."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns when it fires or the time is over."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            pass


class Core:
    """The state of a Scheduler. Times are unix times in seconds unless a name says otherwise."""

    def __init__(self, state_dir: str) -> None:
        self._folder = Path(state_dir).expanduser()
        self._started_s = time.time()
        self._windows = Windows()
        self._journal = Journal(self._folder)
        self._desired_changed = Signal()
        self._reported = Signal()
        self._reports_total = 0
        self._refused: Counter[str] = Counter()
        self._orders_refused: Counter[str] = Counter()
        self._last_note_s: dict[tuple[str, str], float] = {}
        self._remembered_s = time.monotonic()
        self._clock_offset_s = _clock_offset_s()
        self._clock_jumps = 0
        self._clock_owed_s = 0.0  # by which ends of temporary settings are still to be moved
        self._ticking: asyncio.Task[None] | None = None
        self._journal.note(EventKind.SCHEDULER_STARTED, f"scheduler {__version__} started", data={"pid": os.getpid()})
        self._keep_journal()

    # Commits.

    def _commit(
        self,
        changed: Desired,
        event: NewEvent,
        *,
        author: str,
        reason: str,
        engines: list[str] | None,
        patch: dict[str, Any],
        diff: dict[str, list[Any]] | None = None,
        decision: NewDecision | None = None,
        placement: StoredPlacement | None = None,
    ) -> None:
        """Make it last, then tell the agents. Raises StoreUnavailable; then nothing has changed."""
        self._journal.commit(
            changed.without_those_away(self._windows.engines.keys(), MOST_AWAY),
            event,
            author=author,
            reason=reason,
            engines=engines,
            patch=patch,
            diff=diff,
            decision=decision,
            placement=placement,
        )
        self._desired_changed.fire()

    async def _hear_first(self) -> None:
        """After all that was stored is lost, what engines say they run is taken over before anybody changes it."""
        left_s = self._journal.lost_s + HEAR_FIRST_S - time.monotonic()
        if left_s > 0.0:
            await asyncio.sleep(left_s)

    def _next_revision(self) -> int:
        """Above all that any engine has ever been told, also by a store that is lost."""
        held = [r.held_revision for engine in self._windows.engines.values() for r in engine.reports.values()]
        return max(self._journal.desired.revision, *held, 0) + 1

    def _effective(self, desired: Desired, engines: Sequence[str] | None) -> dict[str, Settings]:
        """Settings by engine addressed; without any, of one that starts with defaults. Raises SettingsError."""
        names = sorted(self._windows.engines) if engines is None else engines
        if not names:
            return {"": desired.effective(None, Settings())}
        found = {}
        for name in names:
            try:
                found[name] = desired.effective(name, self._engine(name).start)
            except SettingsError as error:
                raise SettingsError(f"engine {name}: {error.message}", param=error.param) from None
        return found

    def _engine(self, name: str) -> Engine:
        if name not in self._windows.engines:
            known = ", ".join(sorted(self._windows.engines)) or "none"
            raise UnknownEngine(f"no engine named {name!r} has reported; known: {known}", param="engine")
        return self._windows.engines[name]

    # Time.

    def _keep_ticking(self) -> None:
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.get_running_loop().create_task(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            for act in (self._tick, self._keep_journal, self._remember_live):
                try:
                    act()
                except Exception:
                    logger.exception("the scheduler's tick failed; the next one is in %s s", TICK_S)
            await asyncio.sleep(TICK_S)

    def _tick(self) -> None:
        """What time alone brings about: engines become stale, temporary modes end."""
        if self._ticking is None:
            self._keep_ticking()
        self._follow_clock()
        engines = self._windows.engines
        before = dict(engines)
        intervals_s = {name: self._interval_s(engine) for name, engine in before.items()}
        self._note_changes(self._windows.tick(time.monotonic(), intervals_s))
        for name in before.keys() - engines.keys():
            self._journal.forget(name)
        self._end_temporary()

    def _end_temporary(self) -> None:
        now_s = time.time()
        found = self._journal.desired.expired(now_s)
        if found is None or self._journal.problem:
            return
        patch, engines = found
        reason = "its time was over"
        message = f"{' and '.join(patch)} went back on {whom(engines)}: {reason}"
        before = self._journal.desired
        changed = before.without_expired(now_s, self._next_revision())
        diff = self._difference(before, changed, engines)
        data = {"revision": changed.revision, "patch": patch, "engines": engines, "diff": diff}
        event = NewEvent(kind=EventKind.MODE, message=message, time_s=now_s, data=data)
        try:
            self._commit(changed, event, author=LLEP, reason=reason, engines=engines, patch=patch, diff=diff)
        except StoreUnavailable as error:
            logger.warning("a temporary mode can't end yet: %s", error.message)

    def _difference(self, before: Desired, after: Desired, engines: Sequence[str] | None) -> dict[str, list[Any]]:
        """What a change means to those of the engines that are there, and whose settings go together."""
        old, new = {}, {}
        for name, engine in self._windows.engines.items():
            if engines is None or name in engines:
                with contextlib.suppress(SettingsError):
                    old[name], new[name] = (desired.effective(name, engine.start) for desired in (before, after))
        return difference(old, new)

    def _follow_clock(self) -> None:
        """What is set for a time keeps its length where the wall clock is set forward or back."""
        offset_s = _clock_offset_s()
        jump_s, self._clock_offset_s = offset_s - self._clock_offset_s, offset_s
        if abs(jump_s) >= CLOCK_JUMP_S:
            self._clock_jumps += 1
            self._clock_owed_s += jump_s
            message = f"this machine's clock was set {'forward' if jump_s > 0 else 'back'} by {abs(jump_s):.1f} s"
            self._journal.note(EventKind.CLOCK_JUMPED, message, data={"seconds": round(jump_s, 3)})
        if self._clock_owed_s and not self._journal.problem:
            try:
                self._move_times(self._clock_owed_s)
                self._clock_owed_s = 0.0
            except StoreUnavailable as error:
                logger.warning("the ends of temporary settings can't be moved yet: %s", error.message)

    def _move_times(self, seconds: float) -> None:
        """Raises StoreUnavailable; then nothing has changed."""
        before = self._journal.desired
        if not any(before.temporary.values()):
            return
        reason = f"the clock was set by {seconds:+.1f} s: what is set for a time keeps its length"
        event = NewEvent(kind=EventKind.MODE, message=reason, time_s=time.time(), data={"seconds": seconds})
        moved = before.moved_in_time(seconds, self._next_revision())
        self._commit(moved, event, author=LLEP, reason=reason, engines=None, patch={})

    def _interval_s(self, engine: Engine) -> float:
        """The report interval that the engine has been told, which it may not follow yet."""
        override = self._journal.desired.overrides_of(engine.info.engine).get("report_interval_s")
        return float(override.value) if override else engine.start.report_interval_s

    # Events and what lasts.

    def _keep_journal(self) -> None:
        """Open the store if it isn't; the engines it knows are stale until they report."""
        before = self._journal.desired
        for known in self._journal.keep():
            self._restore(known)
        if self._journal.desired is not before:
            self._desired_changed.fire()

    def _restore(self, known: KnownEngine) -> None:
        if known.info.engine in self._windows.engines:
            return
        now_s, silent_s = time.monotonic(), max(time.time() - known.last_seen_s, 0.0)
        try:
            self._windows.restore(known.info, known.incarnation, now_s - silent_s, now_s)
        except Refused as refused:
            logger.warning("engine %s of the state file is left out: %s", known.info.engine, refused)

    def _remember(self, *engines: Engine) -> None:
        """Store who they are and when they were last seen."""
        unix_time = to_unix_time()
        self._journal.remember([KnownEngine(e.info, e.incarnation, unix_time(e.last_seen_s)) for e in engines])

    def _remember_live(self) -> None:
        """From time to time, so that after a restart it is known who was there just before."""
        if time.monotonic() - self._remembered_s > REMEMBER_EVERY_S:
            self._remembered_s = time.monotonic()
            self._remember(*(e for e in self._windows.engines.values() if e.state is EngineState.LIVE))

    def _note_changes(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._journal.note(change.kind, change.message, engine=change.engine, data=change.data)
            engine = self._windows.engines.get(change.engine)
            if engine is not None and change.kind is EventKind.ENGINE_STALE:
                self._remember(engine)  # when it was last seen

    def _note_once(self, about: tuple[str, str], kind: EventKind, message: str, engine: str | None) -> None:
        """At most one event a minute about the same thing, however often it happens."""
        now_s = time.monotonic()
        recent = {key: at_s for key, at_s in self._last_note_s.items() if now_s - at_s < REPEATED_EVENT_EVERY_S}
        if about not in recent and len(recent) < MOST_REPEATED_KINDS:
            recent[about] = now_s
            self._journal.note(kind, message, engine=engine, data={"reason": about[1]})
        self._last_note_s = recent


def _clock_offset_s() -> float:
    """Unix time less a clock that never jumps and runs on while the machine sleeps."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def to_unix_time() -> Callable[[float], float]:
    offset_s = time.time() - time.monotonic()
    return lambda monotonic_s: monotonic_s + offset_s


def whom(engines: Sequence[str] | None) -> str:
    return "all engines" if engines is None else f"{'engine' if len(engines) == 1 else 'engines'} {', '.join(engines)}"


def check_limit(limit: int) -> None:
    """Raises SettingsError."""
    if not 1 <= limit <= MOST_ANSWERED:
        raise SettingsError(f"limit={limit} is not between 1 and {MOST_ANSWERED}", param="limit")
