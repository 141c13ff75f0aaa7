"""The part of the Scheduler with which people change settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from llep.config import Mode
from llep.errors import RevisionConflict, SettingsError, UnknownRevision
from llep.scheduler.core import Core, check_limit, whom
from llep.scheduler.desired import LONGEST_TTL_S, Desired, canonical, check_engines, difference
from llep.scheduler.show import applied_view
from llep.scheduler.store import NewEvent
from llep.views import AppliedView, EventKind, RevisionView, SettingsChange

HELD_GRACE_S = 0.5  # an idle engine holds a revision but runs no step under it: no use in waiting longer
LONGEST_WAIT_S = 60.0
LONGEST_AUTHOR = 200
LONGEST_REASON = 2000


class Changes(Core):
    """Changes are stored before they are acknowledged; a refused one leaves everything as it was."""

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
        await self._hear_first()
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
        await self._hear_first()
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

    async def rollback(
        self,
        revision: int,
        author: str,
        reason: str = "",
        if_revision: int | None = None,
        dry_run: bool = False,
        wait_s: float = 3.0,
    ) -> dict[str, Any]:
        """Put the settings of all engines back to what they were under a revision; that makes a new revision.

        Placements and recordings stay as they are. Answers SettingsChange. Raises UnknownRevision, and as
        patch_settings does.
        """
        await self._hear_first()
        self._tick()
        self._check_revision(if_revision)
        wanted = self._journal.revision(revision) if revision > 0 else None
        if wanted is None and revision != 0:
            raise UnknownRevision(
                f"no revision {revision} is kept: 0 is as started, `llep settings history` lists the others",
                param="revision",
            )
        target = (wanted.desired if wanted else Desired()).of_known_keys()
        return await self._change(
            lambda number: self._journal.desired.put_back(target, number, time.time()),
            kind=EventKind.SETTINGS,
            patch={"rollback": revision},
            author=author,
            reason=reason,
            engines=None,
            dry_run=dry_run,
            wait_s=wait_s,
        )

    async def revisions(self, limit: int = 100, before: int | None = None) -> list[dict[str, Any]]:
        """RevisionView, newest first; with `before` only those below that number. Raises StoreUnavailable."""
        self._tick()
        check_limit(limit)
        return [
            RevisionView(
                number=found.number,
                time_s=found.time_s,
                author=found.author,
                reason=found.reason,
                engines=found.engines,
                patch=found.patch,
                diff=found.diff,
            ).model_dump(mode="json")
            for found in self._journal.revisions(limit, before)
        ]

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
        check_texts(author, reason)
        check_engines(engines)
        for name in engines or ():
            self._engine(name)
        changed = make(self._next_revision())
        diff = difference(self._effective(self._journal.desired, engines), self._effective(changed, engines))
        if not dry_run and not changed.says_the_same_as(self._journal.desired):
            event = NewEvent(
                kind=kind,
                message=f"{words(patch)} on {whom(engines)}{f': {reason}' if reason else ''}",
                time_s=time.time(),
                engine=engines[0] if engines and len(engines) == 1 else None,
                author=author,
                data={
                    **{"revision": changed.revision, "patch": patch, "engines": engines, "diff": diff},
                    **({"reverts_at_s": reverts_at_s} if reverts_at_s else {}),
                },
            )
            self._commit(changed, event, author=author, reason=reason, engines=engines, patch=patch, diff=diff)
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

    def _check_revision(self, if_revision: int | None) -> None:
        if if_revision is not None and if_revision != self._journal.desired.revision:
            raise RevisionConflict(
                f"the settings are at revision {self._journal.desired.revision}, not {if_revision}: read them again",
                param="if_revision",
            )


def _checked_ttl(ttl_s: float) -> float:
    if not (math.isfinite(ttl_s) and 0 < ttl_s <= LONGEST_TTL_S):
        raise SettingsError(f"ttl_s={ttl_s} is not above 0 and at most {LONGEST_TTL_S:.0f} seconds", param="ttl_s")
    return ttl_s


def _checked_mode(mode: str) -> str:
    if mode is None:
        raise SettingsError(f"mode=None is not valid: choose one of {', '.join(Mode)}", param="mode")
    return mode


def check_texts(author: str, reason: str) -> None:
    for name, text, longest in (("author", author, LONGEST_AUTHOR), ("reason", reason, LONGEST_REASON)):
        if len(text) > longest:
            raise SettingsError(f"{name} has {len(text)} characters, above {longest}", param=name)


def words(patch: dict[str, Any]) -> str:
    return ", ".join(f"{key}={'as started' if value is None else value}" for key, value in patch.items()) or "nothing"
