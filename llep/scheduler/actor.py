"""The Scheduler: hears every engine's reports, keeps the settings people ask for, and answers what people ask.

A plain class over asyncio that Ray runs as a detached, named actor; nothing in here names Ray. What must last is in the
store before it is acknowledged; the rest comes back by itself with the engines' next reports.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llep import __version__
from llep.config import Mode, Settings
from llep.errors import RevisionConflict, SettingsError, StoreUnavailable, UnknownEngine
from llep.messages import PROTOCOL, Directive, EngineSnapshot, Report, SchedulerSnapshot, decode_header, encode
from llep.scheduler.admit import LONGEST_NAME, Refused, decode
from llep.scheduler.desired import Desired, adopted_patch, canonical, check_engines, difference
from llep.scheduler.journal import Journal
from llep.scheduler.show import applied_view, engine_view, settings_view
from llep.scheduler.store import KnownEngine, NewEvent
from llep.scheduler.windows import Change, Engine, Windows, loads
from llep.views import AppliedView, EngineState, EventKind, SchedulerStatus, SettingsChange

logger = logging.getLogger("llep.scheduler")

TICK_S = 1.0
REMEMBER_EVERY_S = 60.0
HELD_GRACE_S = 0.5  # an idle engine holds a revision but runs no step under it: no use in waiting longer
REPEATED_EVENT_EVERY_S = 60.0
MOST_REPEATED_KINDS = 1000
LONGEST_POLL_S = 60.0
UNKNOWN_POLL_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_TTL_S = 30 * 86400.0
LONGEST_AUTHOR = 200
LONGEST_REASON = 2000
MOST_EVENTS_ANSWERED = 1000


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


class Scheduler:
    """All methods take and return bytes or plain JSON values; times are unix times in seconds."""

    def __init__(self, state_dir: str) -> None:
        self._folder = Path(state_dir).expanduser()
        self._started_s = time.time()
        self._windows = Windows()
        self._journal = Journal(self._folder)
        self._desired_changed = Signal()
        self._reported = Signal()
        self._reports_total = 0
        self._refused: Counter[str] = Counter()
        self._last_note_s: dict[tuple[str, str], float] = {}
        self._remembered_s = time.monotonic()
        self._ticking: asyncio.Task[None] | None = None
        self._journal.note(EventKind.SCHEDULER_STARTED, f"scheduler {__version__} started", data={"pid": os.getpid()})
        self._keep_journal()

    # What agents call.

    async def report(self, reports: list[bytes], known_revision: int) -> dict[str, Any]:
        """Take encoded Reports of one engine. Answers {"directive": bytes or None, "refused": [why, ...]}.

        The directive is there if one newer than `known_revision` applies to the engine.
        """
        self._keep_ticking()
        refused, engine = [], None
        for data in reports:
            self._reports_total += 1
            try:
                engine = self._take(decode(data))
            except Refused as refusal:
                refused.append(f"{refusal.reason}: {refusal}")
                self._note_refusal(refusal, data)
        self._reported.fire()
        return {"directive": self._directive(engine, known_revision) if engine else None, "refused": refused}

    async def wait_directive(
        self, engine: str, incarnation: str, known_revision: int, timeout_s: float
    ) -> bytes | None:
        """The engine's Directive as soon as one newer than `known_revision` applies; None when the time is over."""
        self._keep_ticking()
        deadline_s = time.monotonic() + min(timeout_s, LONGEST_POLL_S)
        while True:
            known = self._windows.engines.get(engine)
            is_known = known is not None and known.incarnation == incarnation
            if known is not None and is_known and (directive := self._directive(known, known_revision)):
                return directive
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return None
            # Looks again by itself too: an engine gets known by a report, not by a change.
            await self._desired_changed.wait(left_s if is_known else min(left_s, UNKNOWN_POLL_S))

    # What people call, through the control plane.

    async def engines(self) -> list[dict[str, Any]]:
        """EngineView of every engine by name."""
        self._tick()
        engines = sorted(self._windows.engines.items())
        return [
            engine_view(engine, self._journal.desired.revision_of(name), _to_unix_time()).model_dump(mode="json")
            for name, engine in engines
        ]

    async def settings(self, engine: str | None = None) -> dict[str, Any]:
        """SettingsView of one engine, or of one that would start with defaults. Raises UnknownEngine."""
        self._tick()
        known = None if engine is None else self._engine(engine)
        return settings_view(known, self._journal.desired).model_dump(mode="json")

    async def patch_settings(
        self,
        patch: dict[str, Any],
        author: str,
        reason: str = "",
        engines: list[str] | None = None,
        if_revision: int | None = None,
        dry_run: bool = False,
        wait_s: float = 3.0,
    ) -> dict[str, Any]:
        """Lay a merge patch over the settings of some engines or all; None puts a key back to its value at start.

        All or nothing: it must be valid for every engine addressed. Answers SettingsChange, after up to wait_s seconds
        of waiting for the engines to run it. Raises SettingsError, UnknownEngine, RevisionConflict, StoreUnavailable.
        """
        self._tick()
        self._check_revision(if_revision)
        wanted = canonical(patch)
        return await self._change(
            lambda revision: self._journal.desired.changed(wanted, engines, revision),
            kind=EventKind.SETTINGS,
            patch=wanted,
            author=author,
            reason=reason,
            engines=engines,
            dry_run=dry_run,
            wait_s=wait_s,
        )

    async def set_mode(
        self,
        mode: str,
        ttl_s: float | None,
        author: str,
        engines: list[str] | None = None,
        reason: str = "",
        wait_s: float = 3.0,
    ) -> dict[str, Any]:
        """Set the mode; with ttl_s it goes back by itself to the one last set without. Answers SettingsChange."""
        self._tick()
        until_s = None if ttl_s is None else time.time() + _checked_ttl(ttl_s)
        wanted = canonical({"mode": _checked_mode(mode)})
        return await self._change(
            lambda revision: self._journal.desired.changed(wanted, engines, revision, until_s),
            kind=EventKind.MODE,
            patch=wanted,
            author=author,
            reason=reason,
            engines=engines,
            reverts_at_s=until_s,
            wait_s=wait_s,
        )

    async def loads(self, window_s: float = 10.0, engine: str | None = None) -> list[dict[str, Any]]:
        """EngineLoads of one engine or all. Raises UnknownEngine, SettingsError for an impossible window."""
        self._tick()
        if not (math.isfinite(window_s) and window_s > 0):
            raise SettingsError(f"window_s={window_s} is not valid: give seconds above 0", param="window_s")
        chosen = [self._engine(engine)] if engine else [e for _, e in sorted(self._windows.engines.items())]
        now_s = time.monotonic()
        return [loads(e, window_s, now_s, self._interval_s(e)).model_dump(mode="json") for e in chosen]

    async def events(
        self, limit: int = 100, before_id: int | None = None, after_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Events, newest first. Raises StoreUnavailable."""
        self._tick()
        if not 1 <= limit <= MOST_EVENTS_ANSWERED:
            raise SettingsError(f"limit={limit} is not between 1 and {MOST_EVENTS_ANSWERED}", param="limit")
        found = self._journal.events(limit, before_id=before_id, after_id=after_id)
        return [event.model_dump(mode="json") for event in found]

    async def status(self) -> dict[str, Any]:
        """SchedulerStatus."""
        self._keep_ticking()
        status = SchedulerStatus(
            version=__version__,
            pid=os.getpid(),
            started_s=self._started_s,
            store_open=not self._journal.problem,
            store_path=str(self._folder),
            store_problem=self._journal.problem,
            desired_revision=self._journal.desired.revision,
            engines=len(self._windows.engines),
            reports_total=self._reports_total,
            reports_refused_total=self._refused.total(),
            reports_refused=dict(self._refused),
        )
        return status.model_dump(mode="json")

    async def metrics(self) -> bytes:
        """An encoded SchedulerSnapshot."""
        self._tick()
        to_unix_time = _to_unix_time()
        engines = tuple(
            EngineSnapshot(
                engine=name,
                state=str(engine.state),
                desired_revision=self._journal.desired.revision_of(name),
                last_seen_s=to_unix_time(engine.last_seen_s),
                refused=dict(engine.refused),
                reports=engine.reports,
            )
            for name, engine in sorted(self._windows.engines.items())
        )
        store_open = not self._journal.problem
        return encode(SchedulerSnapshot(protocol=PROTOCOL, time_s=time.time(), store_open=store_open, engines=engines))

    # Reports.

    def _take(self, report: Report) -> Engine:
        """Raises Refused."""
        name, now_s = report.info.engine, time.monotonic()
        known = self._windows.engines.get(name)
        changes = self._windows.take(report, now_s, self._interval_s(known) if known else 0.0)
        engine = self._windows.engines[name]
        if engine is not known:
            self._remember(engine)
        self._note_changes(changes)
        self._adopt(engine)
        return engine

    def _directive(self, engine: Engine, known_revision: int) -> bytes | None:
        name = engine.info.engine
        revision = self._journal.desired.revision_of(name)
        if revision <= known_revision:
            return None
        try:
            settings = self._journal.desired.effective(name, engine.start).dump()
        except SettingsError as error:  # it started anew with settings that don't go with the overrides
            self._note_once((name, "effective"), EventKind.APPLY_FAILED, f"revision {revision}: {error.message}", name)
            return None
        return encode(Directive(protocol=PROTOCOL, engine=name, revision=revision, settings=settings))

    def _adopt(self, engine: Engine) -> None:
        """An engine that runs a revision which the store doesn't know tells us what was lost with the store."""
        name, revision = engine.info.engine, engine.live_revision
        if (
            self._journal.problem
            or revision <= self._journal.desired.revision_of(name)
            or engine.held_revision != revision
        ):
            return
        patch = adopted_patch(engine.live_settings.dump(), engine.start)
        message = f"the store did not know revision {revision} that engine {name} runs: its settings were taken over"
        try:
            self._commit(
                self._journal.desired.changed(patch, [name], self._next_revision()),
                NewEvent(
                    kind=EventKind.SETTINGS, message=message, time_s=time.time(), engine=name, data={"patch": patch}
                ),
                author="llep",
                reason=message,
                engines=[name],
                patch=patch,
            )
        except StoreUnavailable as error:
            logger.warning("%s", error.message)

    # Changes.

    async def _change(
        self,
        make: Callable[[int], Desired],
        *,
        kind: EventKind,
        patch: dict[str, Any],
        author: str,
        reason: str,
        engines: list[str] | None,
        wait_s: float,
        dry_run: bool = False,
        reverts_at_s: float | None = None,
    ) -> dict[str, Any]:
        _check_texts(author, reason)
        check_engines(engines)
        for name in engines or ():
            self._engine(name)
        changed = make(self._next_revision())
        diff = difference(self._effective(self._journal.desired, engines), self._effective(changed, engines))
        if not dry_run and not changed.says_the_same_as(self._journal.desired):
            event = NewEvent(
                kind=kind,
                message=f"{_words(patch)} on {_whom(engines)}{f': {reason}' if reason else ''}",
                time_s=time.time(),
                engine=engines[0] if engines and len(engines) == 1 else None,
                author=author,
                data={
                    **{"revision": changed.revision, "patch": patch, "engines": engines, "diff": diff},
                    **({"reverts_at_s": reverts_at_s} if reverts_at_s else {}),
                },
            )
            self._commit(changed, event, author=author, reason=reason, engines=engines, patch=patch)
        revision = self._journal.desired.revision
        return SettingsChange(
            revision=revision,
            dry_run=dry_run,
            engines=engines,
            diff=diff,
            applied=[] if dry_run else await self._applied(engines, wait_s),
            reverts_at_s=reverts_at_s,
        ).model_dump(mode="json")

    async def _applied(self, engines: list[str] | None, wait_s: float) -> list[AppliedView]:
        """Where the engines addressed stand, once all that are there run their revision or the waiting is over."""
        names = sorted(self._windows.engines) if engines is None else engines
        wanted = {name: self._journal.desired.revision_of(name) for name in names}
        deadline_s = time.monotonic() + min(max(wait_s, 0.0), LONGEST_WAIT_S)
        while True:
            known = {name: self._windows.engines[name] for name in names if name in self._windows.engines}
            views = [applied_view(engine, wanted[name]) for name, engine in known.items()]
            states = {view.state for view in views}
            now_s = time.monotonic()
            if "held" in states and "sent" not in states:
                interval_s = max(self._interval_s(engine) for engine in known.values())
                deadline_s = min(deadline_s, now_s + interval_s + HELD_GRACE_S)
            if not states & {"sent", "held"} or now_s >= deadline_s:
                return views
            await self._reported.wait(deadline_s - now_s)

    def _commit(
        self,
        changed: Desired,
        event: NewEvent,
        *,
        author: str,
        reason: str,
        engines: list[str] | None,
        patch: dict[str, Any],
    ) -> None:
        """Make it last, then tell the agents. Raises StoreUnavailable; then nothing has changed."""
        self._journal.commit(changed, event, author=author, reason=reason, engines=engines, patch=patch)
        self._desired_changed.fire()

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

    def _check_revision(self, if_revision: int | None) -> None:
        if if_revision is not None and if_revision != self._journal.desired.revision:
            raise RevisionConflict(
                f"the settings are at revision {self._journal.desired.revision}, not {if_revision}: read them again",
                param="if_revision",
            )

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
            try:
                self._tick()
                self._keep_journal()
                self._remember_live()
            except Exception:
                logger.exception("the scheduler's tick failed; the next one is in %s s", TICK_S)
            await asyncio.sleep(TICK_S)

    def _tick(self) -> None:
        """What time alone brings about: engines become stale, temporary modes end."""
        if self._ticking is None:
            self._keep_ticking()
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
        message = f"{' and '.join(patch)} went back on {_whom(engines)}: {reason}"
        changed = self._journal.desired.without_expired(now_s, self._next_revision())
        data = {"revision": changed.revision, "patch": patch, "engines": engines}
        event = NewEvent(kind=EventKind.MODE, message=message, time_s=now_s, data=data)
        try:
            self._commit(changed, event, author="llep", reason=reason, engines=engines, patch=patch)
        except StoreUnavailable as error:
            logger.warning("a temporary mode can't end yet: %s", error.message)

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
        to_unix_time = _to_unix_time()
        self._journal.remember([KnownEngine(e.info, e.incarnation, to_unix_time(e.last_seen_s)) for e in engines])

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

    def _note_refusal(self, refusal: Refused, data: bytes) -> None:
        self._refused[refusal.reason] += 1
        try:
            engine = decode_header(data).info.engine[:LONGEST_NAME]
        except ValueError:
            engine = None
        message = f"a report{f' of engine {engine}' if engine else ''} is refused ({refusal.reason}): {refusal}"
        self._note_once((engine or "", refusal.reason), EventKind.REPORT_REFUSED, message, engine)

    def _note_once(self, about: tuple[str, str], kind: EventKind, message: str, engine: str | None) -> None:
        """At most one event a minute about the same thing, however often it happens."""
        now_s = time.monotonic()
        recent = {key: at_s for key, at_s in self._last_note_s.items() if now_s - at_s < REPEATED_EVENT_EVERY_S}
        if about not in recent and len(recent) < MOST_REPEATED_KINDS:
            recent[about] = now_s
            self._journal.note(kind, message, engine=engine, data={"reason": about[1]})
        self._last_note_s = recent


def _to_unix_time() -> Callable[[float], float]:
    offset_s = time.time() - time.monotonic()
    return lambda monotonic_s: monotonic_s + offset_s


def _checked_ttl(ttl_s: float) -> float:
    if not (math.isfinite(ttl_s) and 0 < ttl_s <= LONGEST_TTL_S):
        raise SettingsError(f"ttl_s={ttl_s} is not above 0 and at most {LONGEST_TTL_S:.0f} seconds", param="ttl_s")
    return ttl_s


def _checked_mode(mode: str) -> str:
    if mode is None:
        raise SettingsError(f"mode=None is not valid: choose one of {', '.join(Mode)}", param="mode")
    return mode


def _check_texts(author: str, reason: str) -> None:
    for name, text, longest in (("author", author, LONGEST_AUTHOR), ("reason", reason, LONGEST_REASON)):
        if len(text) > longest:
            raise SettingsError(f"{name} has {len(text)} characters, above {longest}", param=name)


def _words(patch: dict[str, Any]) -> str:
    return ", ".join(f"{key}={'as started' if value is None else value}" for key, value in patch.items()) or "nothing"


def _whom(engines: Sequence[str] | None) -> str:
    return "all engines" if engines is None else f"{'engine' if len(engines) == 1 else 'engines'} {', '.join(engines)}"
