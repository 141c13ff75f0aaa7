"""The scheduler's memory that lasts: desired settings and events, over a store that may fail or be damaged."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llep.errors import StoreUnavailable
from llep.scheduler.desired import Desired, is_of_settings
from llep.scheduler.store import (
    Damaged,
    KnownEngine,
    NewDecision,
    NewEvent,
    Revision,
    Store,
    StoredPlacement,
)
from llep.views import DecisionView, Event, EventKind

logger = logging.getLogger("llep.scheduler")

PRUNE_EVERY_S = 3600.0
PRUNE_AGAIN_S = 60.0  # where it has grown too large since
MOST_EVENTS_WAITING = 1000
LLEP = "llep"  # the author of what the scheduler itself does

T = TypeVar("T")


class Journal:
    """`desired` is what holds; it changes only through commit. `problem`: why nothing can change; empty if it can."""

    def __init__(self, folder: Path) -> None:
        self.desired = Desired()
        self.problem = "the store is not open yet"
        self.opened_revision = 0  # the newest that was stored when this scheduler began
        self.lost_s = -math.inf  # monotonic time at which all that was stored turned out lost
        self._folder = folder
        self._store: Store | None = None
        self._waiting: deque[NewEvent] = deque(maxlen=MOST_EVENTS_WAITING)
        self._is_set_aside = False  # a file was, and no other is open yet
        self._pruned_s = -math.inf

    def keep(self) -> list[KnownEngine]:
        """Open the store if it isn't, and prune it from time to time. Returns the engines of a store just opened."""
        if self._store is None:
            return self._open()
        if self.problem:
            with contextlib.suppress(StoreUnavailable):
                self._write(lambda store: store.probe())
                self.problem = ""
        self._prune()
        return []

    def _prune(self) -> None:
        since_s = time.monotonic() - self._pruned_s
        with contextlib.suppress(StoreUnavailable):
            if since_s > PRUNE_EVERY_S or (since_s > PRUNE_AGAIN_S and self._do(lambda store: store.is_too_large)):
                self._pruned_s = time.monotonic()
                self._try(lambda store: store.prune(time.time()))

    def commit(
        self,
        desired: Desired,
        event: NewEvent,
        *,
        author: str,
        reason: str,
        engines: Sequence[str] | None,
        patch: dict[str, Any],
        diff: dict[str, list[Any]] | None = None,
        decision: NewDecision | None = None,
        placement: StoredPlacement | None = None,
    ) -> None:
        """Make it last, then make it so. Raises StoreUnavailable; then nothing has changed."""
        revision = Revision(
            number=desired.revision,
            time_s=event.time_s,
            author=author,
            reason=reason,
            engines=None if engines is None else list(engines),
            patch=patch,
            desired=desired,
            diff=diff or {},
        )
        self._write(lambda store: store.append(revision, event, decision, placement))
        self.problem = ""
        self.desired = desired
        logger.info("revision %d: %s", desired.revision, event.message)

    def note(self, kind: EventKind, message: str, *, engine: str | None = None, data: dict[str, Any]) -> None:
        """Keep an event; while the store can't, in memory."""
        logger.info("%s", message)
        self._waiting.append(NewEvent(kind=kind, message=message, time_s=time.time(), engine=engine, data=data))
        if self._store is not None:
            self._try(self._write_waiting)

    def events(
        self,
        limit: int,
        *,
        before_id: int | None,
        after_id: int | None,
        engine: str | None = None,
        kinds: Sequence[str] | None = None,
    ) -> list[Event]:
        """Newest first. Raises StoreUnavailable."""
        wanted = {"before_id": before_id, "after_id": after_id}
        return self._do(lambda store: store.events(limit, **wanted, engine=engine, kinds=kinds))

    def revisions(self, limit: int, before: int | None) -> list[Revision]:
        """Newest first. Raises StoreUnavailable."""
        return self._do(lambda store: store.revisions(limit, before))

    def is_changed_by_people(self, engine: str, since: int) -> bool:
        """Whether a person has changed settings of the engine after a revision. Raises StoreUnavailable."""
        changed = self._do(lambda store: store.changed_by_others(LLEP, since))
        return any(engines is None or engine in engines for engines, patch in changed if is_of_settings(patch))

    def revision(self, number: int) -> Revision | None:
        """Raises StoreUnavailable."""
        return self._do(lambda store: store.revision(number))

    def decide(self, decision: NewDecision) -> None:
        """Keep a decision that changes nothing; while the store can't, only the log has it."""
        self._try(lambda store: store.add_decision(decision))

    def decisions(
        self, limit: int, *, engine: str | None = None, kind: str | None = None, before_id: int | None = None
    ) -> list[DecisionView]:
        """Newest first. Raises StoreUnavailable."""
        return self._do(lambda store: store.decisions(limit, engine=engine, kind=kind, before_id=before_id))

    def placements(self, engine: str, limit: int) -> list[StoredPlacement]:
        """Newest first. Raises StoreUnavailable."""
        return self._do(lambda store: store.placements(engine, limit))

    def remember(self, engines: Sequence[KnownEngine]) -> None:
        self._try(lambda store: store.put_engines(engines))

    def forget(self, engine: str) -> None:
        self._try(lambda store: store.forget_engine(engine))

    def _do(self, act: Callable[[Store], T]) -> T:
        """act(store), once more in a new file if the file turns out damaged. Raises StoreUnavailable."""
        for _ in range(2):
            if self._store is None:
                raise StoreUnavailable(self.problem)
            try:
                return act(self._store)
            except Damaged as damage:
                self._close(str(damage))
                self._open()
        raise StoreUnavailable(self.problem or f"the scheduler's state in {self._folder} is damaged again and again")

    def _write(self, act: Callable[[Store], None]) -> None:
        """As _do; a disk that can't take it is a problem until it takes a change, or could. Raises StoreUnavailable."""
        try:
            self._do(act)
        except StoreUnavailable as error:
            if error.message != self.problem:
                logger.error("%s", error.message)
            self.problem = error.message
            raise

    def _try(self, act: Callable[[Store], None]) -> None:
        """For what may be lost."""
        try:
            self._write(act)
        except StoreUnavailable as error:
            logger.warning("%s", error.message)

    def _open(self) -> list[KnownEngine]:
        """Open the store and take over what it knows; while that fails, say why, and go on without."""
        try:
            self._store = Store(self._folder, on_set_aside=self._note_set_aside)
            engines = self._take_over(self._store)
        except (StoreUnavailable, Damaged) as error:
            if str(error) != self.problem:
                logger.error("%s", error)
            self._close(str(error))
            return []
        self.problem = ""
        return engines

    def _note_set_aside(self, path: Path | None) -> None:
        self._is_set_aside = True
        self._waiting.append(_set_aside_event(path))

    def _take_over(self, store: Store) -> list[KnownEngine]:
        stored = store.desired().of_known_keys()
        is_lost = stored.revision < self.desired.revision
        if self._is_set_aside and not self.desired.revision:
            self.lost_s = time.monotonic()
        if is_lost:  # under us: what we hold in memory is the truth
            if not self._is_set_aside:
                self._waiting.append(_set_aside_event(None))
            store.append(*_written_again(self.desired))
        else:
            self.desired = stored
            self.opened_revision = stored.revision
        engines = store.engines()
        self._write_waiting(store)
        self._is_set_aside = False
        return engines

    def _write_waiting(self, store: Store) -> None:
        store.add_events(self._waiting)
        self._waiting.clear()

    def _close(self, problem: str) -> None:
        if self._store is not None:
            self._store.close()
        self._store, self.problem = None, problem


def _set_aside_event(path: Path | None) -> NewEvent:
    kept = f"damaged and is kept as {path.name}" if path is not None else "empty or gone"
    message = f"the state file was {kept}; a new one is begun"
    data = {"path": str(path) if path is not None else None}
    return NewEvent(kind=EventKind.STORE_SET_ASIDE, message=message, time_s=time.time(), data=data)


def _written_again(desired: Desired) -> tuple[Revision, NewEvent]:
    reason = f"revision {desired.revision} is written again: the state file was damaged or gone"
    now_s = time.time()
    revision = Revision(
        number=desired.revision, time_s=now_s, author=LLEP, reason=reason, engines=None, patch={}, desired=desired
    )
    return revision, NewEvent(kind=EventKind.SETTINGS, message=reason, time_s=now_s, data={})
