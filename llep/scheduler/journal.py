"""The scheduler's memory that lasts: desired settings and events, over a store that may fail or be damaged."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llep.errors import StoreUnavailable
from llep.scheduler.desired import Desired
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
MOST_EVENTS_WAITING = 1000
LLEP = "llep"  # the author of what the scheduler itself does

T = TypeVar("T")


class Journal:
    """`desired` is what holds; it changes only through commit. `problem`: why nothing can change; empty if it can."""

    def __init__(self, folder: Path) -> None:
        self.desired = Desired()
        self.problem = "the store is not open yet"
        self.own_revisions: set[int] = set()  # those that llep itself made
        self._folder = folder
        self._store: Store | None = None
        self._waiting: deque[NewEvent] = deque(maxlen=MOST_EVENTS_WAITING)
        self._pruned_s = time.monotonic()

    def keep(self) -> list[KnownEngine]:
        """Open the store if it isn't, and prune it from time to time. Returns the engines of a store just opened."""
        if self._store is None:
            return self._open()
        if self.problem:
            with contextlib.suppress(StoreUnavailable):
                self._write(lambda store: store.probe())
                self.problem = ""
        if time.monotonic() - self._pruned_s > PRUNE_EVERY_S:
            self._pruned_s = time.monotonic()
            self._try(lambda store: store.prune(time.time()))
        return []

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
        if author == LLEP:
            self.own_revisions.add(revision.number)
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
            self._store = Store(self._folder)
            engines = self._take_over(self._store)
        except (StoreUnavailable, Damaged) as error:
            if str(error) != self.problem:
                logger.error("%s", error)
            self._close(str(error))
            return []
        self.problem = ""
        return engines

    def _take_over(self, store: Store) -> list[KnownEngine]:
        stored = store.desired().of_known_keys()
        is_lost = stored.revision < self.desired.revision
        if store.set_aside is not None or is_lost:
            self._waiting.append(_set_aside_event(store.set_aside))
        if is_lost:  # under us: what we hold in memory is the truth
            store.append(*_written_again(self.desired))
        else:
            self.desired = stored
        self.own_revisions = store.revisions_by(LLEP)
        engines = store.engines()
        self._write_waiting(store)
        return engines

    def _write_waiting(self, store: Store) -> None:
        store.add_events(self._waiting)
        self._waiting.clear()

    def _close(self, problem: str) -> None:
        if self._store is not None:
            self._store.close()
        self._store, self.problem = None, problem


def _set_aside_event(path: Path | None) -> NewEvent:
    kept = f"damaged and is kept as {path.name}" if path is not None else "gone"
    message = f"the state file was {kept}; a new one is begun"
    data = {"path": str(path) if path is not None else None}
    return NewEvent(kind=EventKind.STORE_SET_ASIDE, message=message, time_s=time.time(), data=data)


def _written_again(desired: Desired) -> tuple[Revision, NewEvent]:
    reason = f"revision {desired.revision} is written again: the state file was damaged or gone"
    now_s = time.time()
    revision = Revision(
        number=desired.revision, time_s=now_s, author="llep", reason=reason, engines=None, patch={}, desired=desired
    )
    return revision, NewEvent(kind=EventKind.SETTINGS, message=reason, time_s=now_s, data={})
