"""The part of the Scheduler that agents call: reports come in, directives go out."""

from __future__ import annotations

import logging
import time
from typing import Any

from llep.errors import SettingsError, StoreUnavailable
from llep.messages import PROTOCOL, Directive, PlacementOrder, Report, decode_header, encode
from llep.scheduler.admit import LONGEST_NAME, Refusal, Refused, decode
from llep.scheduler.core import Core
from llep.scheduler.desired import adopted_patch
from llep.scheduler.journal import LLEP
from llep.scheduler.show_loads import misfit
from llep.scheduler.store import NewEvent
from llep.scheduler.windows import Engine
from llep.views import EventKind

logger = logging.getLogger("llep.scheduler")

LONGEST_POLL_S = 60.0
UNKNOWN_POLL_S = 1.0


class Reports(Core):
    """Hears engines, and tells them what they should run."""

    async def report(
        self, reports: list[bytes], known_revision: int, left_out: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Take encoded Reports of one engine. Answers {"directive": bytes or None, "refused": [why, ...]}.

        The directive is there if one newer than `known_revision` applies to the engine. left_out: how many reports the
        agent could not bring, by Refusal.
        """
        self._keep_ticking()
        for reason in Refusal:
            if count := (left_out or {}).get(reason, 0):
                self._reports_total += count
                self._refused[reason] += count
                self._windows.count_refusal(None, reason, count)
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

    def _take(self, report: Report) -> Engine:
        """Raises Refused."""
        name, now_s = report.info.engine, time.monotonic()
        known = self._windows.engines.get(name)
        interval_s = self._interval_s(known) if known else 0.0
        changes = self._windows.take(report, now_s, interval_s, self._journal.desired.revision)
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
        if name in self._journal.desired.placements and engine.home_rank_LE is None:
            return None  # whether the placement fits is known when rank 0 has reported: soon
        try:
            settings = self._journal.desired.effective(name, engine.start).dump()
        except SettingsError as error:  # it started anew with settings that don't go with the overrides
            self._note_once((name, "effective"), EventKind.APPLY_FAILED, f"revision {revision}: {error.message}", name)
            return None
        return encode(
            Directive(
                protocol=PROTOCOL,
                engine=name,
                revision=revision,
                settings=settings,
                placement=self._fitting_placement(engine),
                recording=self._journal.desired.recordings.get(name),
            )
        )

    def _fitting_placement(self, engine: Engine) -> PlacementOrder | None:
        """None also where the engine has started anew with less room, or as another model: it would refuse it all."""
        order = self._journal.desired.placements.get(engine.info.engine)
        return order if order is not None and misfit(engine, order.replicas) is None else None

    def _adopt(self, engine: Engine) -> None:
        """An engine that runs a revision which the store doesn't know tells us what was lost with the store.

        What people have changed since then holds: they may have, before this engine was heard.
        """
        name, revision = engine.info.engine, engine.live_revision
        if self._journal.problem or engine.held_revision != revision or not self._is_unknown(engine, revision):
            return
        overrides, opened = self._journal.desired.overrides_of(name), self._journal.opened_revision
        newer = {key for key, override in overrides.items() if override.revision > opened}
        running = adopted_patch(engine.live_settings.dump(), engine.start)
        patch = {key: value for key, value in running.items() if key not in newer}
        message = f"the store did not know revision {revision} that engine {name} runs: its settings were taken over"
        try:
            self._commit(
                self._journal.desired.changed(patch, [name], self._next_revision()),
                NewEvent(
                    kind=EventKind.SETTINGS, message=message, time_s=time.time(), engine=name, data={"patch": patch}
                ),
                author=LLEP,
                reason=message,
                engines=[name],
                patch=patch,
            )
        except StoreUnavailable as error:
            logger.warning("%s", error.message)

    def _is_unknown(self, engine: Engine, revision: int) -> bool:
        """Whether what the engine runs is none of ours: too new, or of our number by chance."""
        name = engine.info.engine
        ours = self._journal.desired.revision_of(name)
        if revision != ours or revision <= self._journal.opened_revision:
            return revision > ours
        if engine.is_compared:
            return False
        engine.is_compared = True
        try:
            return self._journal.desired.effective(name, engine.start) != engine.live_settings
        except SettingsError:
            return False

    def _note_refusal(self, refusal: Refused, data: bytes) -> None:
        self._refused[refusal.reason] += 1
        try:
            engine = decode_header(data).info.engine[:LONGEST_NAME]
        except ValueError:
            engine = None
        if refusal.reason in (Refusal.GARBLED, Refusal.PROTOCOL):  # the windows count the others
            self._windows.count_refusal(engine, refusal.reason)
        message = f"a report{f' of engine {engine}' if engine else ''} is refused ({refusal.reason}): {refusal}"
        self._note_once((engine or "", refusal.reason), EventKind.REPORT_REFUSED, message, engine)
