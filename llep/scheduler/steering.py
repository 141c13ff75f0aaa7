"""The part of the Scheduler that decides by itself, engine after engine: placement, brake, thresholds, advice.

Deciding is pure (decide.py, decide_placement.py) and the placement is planned in a thread, so that reports never wait.
Whatever it changes is a revision by llep, with a reason; what people change always wins.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llep.config import Replicas
from llep.errors import LlepError, SettingsError
from llep.scheduler.changes import words
from llep.scheduler.decide import Brake, Decision, advise, decide_brake, decide_thresholds
from llep.scheduler.decide_placement import decide_placement, is_overfull
from llep.scheduler.desired import EVERY, Desired, difference
from llep.scheduler.evidence import Evidence
from llep.scheduler.journal import LLEP
from llep.scheduler.placements import Placements, copies_of, stored_decision
from llep.scheduler.show_loads import evidence_of, misfit
from llep.scheduler.store import NewEvent
from llep.scheduler.windows import Engine
from llep.views import AdviceView, EngineState, EventKind

logger = logging.getLogger("llep.scheduler")

WINDOW_S = 600.0
TUNE_EVERY_S = 300.0
HELD_FOR_PEOPLE_S = 3600.0  # a placement that a person ordered, or went back to, is not changed by llep for so long
SAID_AGAIN_S = 3600.0  # a decision that stays the same is stored again


class Steering(Placements):
    """Decides about one engine after the other while reports come in."""

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self._steering: asyncio.Task[None] | None = None
        self._decide_next_s: dict[str, float] = {}
        self._brakes: dict[str, Brake] = {}
        self._brake_revisions: dict[str, int] = {}  # the engine's when its brake was last looked at
        self._tuned_s: dict[str, float] = {}
        self._said: dict[tuple[str, str], tuple[str, float]] = {}  # (engine, kind) -> what was stored last, and when

    def _keep_ticking(self) -> None:
        super()._keep_ticking()
        if self._steering is None or self._steering.done():
            self._steering = asyncio.get_running_loop().create_task(self._steer_for_ever())

    async def advice(self, engine: str | None = None) -> list[dict[str, Any]]:
        """AdviceView of one engine or all. Raises UnknownEngine."""
        self._tick()
        chosen = [self._engine(engine)] if engine else [e for _, e in sorted(self._windows.engines.items())]
        return [self._advice_view(each).model_dump(mode="json") for each in chosen]

    def _advice_view(self, engine: Engine) -> AdviceView:
        evidence = self._evidence(engine)
        found, better = advise(evidence), decide_thresholds(evidence, engine.start)
        patch, reason = dict(found.patch), found.reason
        if better.patch and found.outcome != "not_worth_it":
            patch |= better.patch
            reason += f"; {better.reason}"
        return AdviceView(
            engine=engine.info.engine, verdict=found.outcome, reason=reason, numbers=found.inputs, patch=patch
        )

    async def _steer_for_ever(self) -> None:
        while True:
            now_s = time.monotonic()
            engines = list(self._windows.engines.items())
            for name, engine in engines:
                if engine.state is EngineState.LIVE and now_s >= self._decide_next_s.get(name, 0.0):
                    self._decide_next_s[name] = now_s + engine.start.decide_every_s
                    try:
                        await self._steer(engine)
                    except LlepError as error:
                        logger.warning("nothing is decided about engine %s: %s", name, error.message)
                    except Exception:
                        logger.exception("deciding about engine %s failed; it is tried again", name)
                    await asyncio.sleep(0)  # reports first
            known = self._windows.engines
            self._decide_next_s = {name: at_s for name, at_s in self._decide_next_s.items() if name in known}
            self._brakes = {name: brake for name, brake in self._brakes.items() if name in known}
            self._said = {key: said for key, said in self._said.items() if key[0] in known}
            await asyncio.sleep(1.0)

    async def _steer(self, engine: Engine) -> None:
        """One round of decisions about an engine that runs what it should."""
        name = engine.info.engine
        problem = misfit(engine, self._present(engine))
        if problem and engine.home_rank_LE is not None:
            self._refused_order(problem)
            self._order(engine, (), LLEP, f"the engine has started anew, and they don't fit it any more: {problem}")
            return
        if self._journal.problem or engine.live_revision < self._journal.desired.revision_of(name):
            return
        evidence = self._evidence(engine)
        self._steer_brake(engine, evidence)
        self._steer_thresholds(engine, evidence)
        self._keep(engine, advise(evidence))
        await self._steer_placement(engine)

    def _evidence(self, engine: Engine) -> Evidence:
        """Of the settings that the engine runs now: what was before says nothing about them."""
        now_s = time.monotonic()
        window_s = min(WINDOW_S, now_s - engine.settled_s)
        return evidence_of(engine, window_s, now_s, self._interval_s(engine))

    def _move_times(self, seconds: float) -> None:
        super()._move_times(seconds)
        self._brakes = {
            name: Brake(brake.strikes, brake.since_s + seconds, brake.until_s + seconds)
            for name, brake in self._brakes.items()
        }

    # Settings.

    def _steer_brake(self, engine: Engine, evidence: Evidence) -> None:
        name, now_s = engine.info.engine, time.time()
        brake = self._brake(name)
        revision, seen = self._journal.desired.revision_of(name), self._brake_revisions.get(name, 0)
        if revision > seen:
            if self._journal.is_changed_by_people(name, seen):
                brake = Brake()
            self._brake_revisions[name] = revision
        decision = decide_brake(evidence, brake, now_s)
        if decision.outcome == "forgiven":
            brake = Brake()
        if decision.patch and self._is_held_by_people(name, decision.patch):
            reason = f"{decision.reason}; but what a person set for a time holds"
            decision = Decision(kind="brake", outcome="nothing", reason=reason, inputs=decision.inputs)
        if decision.patch and decision.for_s is not None:
            until_s = now_s + decision.for_s
            brake = Brake(brake.strikes + 1, now_s, until_s)
            decision.inputs.update(since_s=now_s, until_s=until_s)
            if not self._set(engine, decision, EventKind.BRAKE, until_s):
                return
            self._brake_revisions[name] = self._journal.desired.revision_of(name)
        else:
            decision.inputs.update(
                strikes=brake.strikes, since_s=_finite(brake.since_s), until_s=_finite(brake.until_s)
            )
            self._keep(engine, decision)
        self._brakes[name] = brake

    def _brake(self, name: str) -> Brake:
        """As it was before a restart, too."""
        if name not in self._brakes:
            stored = self._journal.decisions(1, engine=name, kind="brake")
            inputs = stored[0].inputs if stored else {}
            times = [inputs.get(key) for key in ("since_s", "until_s")]
            since_s, until_s = (-math.inf if value is None else float(value) for value in times)
            self._brakes[name] = Brake(int(inputs.get("strikes") or 0), since_s, until_s)
            self._brake_revisions[name] = (
                (stored[0].revision or 0) if stored else self._journal.desired.revision_of(name)
            )
        return self._brakes[name]

    def _steer_thresholds(self, engine: Engine, evidence: Evidence) -> None:
        name = engine.info.engine
        decision = decide_thresholds(evidence, engine.start)
        if not (decision.patch and evidence.settings.auto_tune):
            return self._keep(engine, decision)
        overrides = self._journal.desired.overrides_of(name)
        free = {key: value for key, value in decision.patch.items() if key not in overrides or overrides[key].by_llep}
        is_braked = time.time() < self._brake(name).until_s
        if not free or is_braked or time.monotonic() - self._tuned_s.get(name, -math.inf) < TUNE_EVERY_S:
            return self._keep(engine, decision)
        self._tuned_s[name] = time.monotonic()
        tuned = Decision(kind="thresholds", outcome="set", reason=decision.reason, inputs=decision.inputs, patch=free)
        self._set(engine, tuned, EventKind.SETTINGS, None)

    def _set(self, engine: Engine, decision: Decision, kind: EventKind, until_s: float | None) -> bool:
        """Make a decision's patch a revision. Whether it could be stored."""
        name, now_s, before = engine.info.engine, time.time(), self._journal.desired
        changed = before.changed(decision.patch, [name], self._next_revision(), until_s, by_llep=True)
        if changed.says_the_same_as(before):
            return False
        try:
            diff = difference(self._effective(before, [name]), self._effective(changed, [name]))
        except SettingsError as error:
            logger.warning("engine %s can't be changed: %s", name, error.message)
            return False
        data = {"revision": changed.revision, "patch": decision.patch, "engines": [name], "diff": diff}
        message = f"{words(decision.patch)} on engine {name}: {decision.reason}"
        event = NewEvent(kind=kind, message=message, time_s=now_s, engine=name, author=LLEP, data=data)
        try:
            self._commit(
                changed,
                event,
                author=LLEP,
                reason=decision.reason,
                engines=[name],
                patch=decision.patch,
                diff=diff,
                decision=stored_decision(name, decision, now_s, changed.revision),
            )
        except LlepError as error:
            logger.warning("engine %s can't be changed: %s", name, error.message)
            return False
        return True

    def _is_held_by_people(self, name: str, keys: Mapping[str, Any]) -> bool:
        """Whether a person has set one of these keys for a time that isn't over."""
        desired: Desired = self._journal.desired
        return any(
            not override.by_llep and override.until_s is not None
            for target in (EVERY, name)
            for key, override in desired.temporary.get(target, {}).items()
            if key in keys
        )

    # Placement.

    async def _steer_placement(self, engine: Engine) -> None:
        name = engine.info.engine
        settings, present = self._settings_of(engine), self._present(engine)
        if settings.replicas is Replicas.OFF:
            if present:
                self._order(engine, (), LLEP, "replicas is off")
            return
        ground = self._ground(engine)
        order = self._journal.desired.placements.get(name)
        is_filling = order is not None and engine.live_placement != order.number
        decision, found = await asyncio.to_thread(decide_placement, ground, is_filling=is_filling)
        if not (self._windows.engines.get(name) is engine and self._journal.desired.placements.get(name) == order):
            return  # while it was planned, the engine started anew or somebody ordered another placement
        if decision.outcome == "order" and self._settings_of(engine) != settings:
            return  # as soon as the new settings are live, they are asked
        if decision.outcome == "order" and not is_overfull(ground) and (held := self._held_placement(name)):
            decision, found = replace(decision, outcome="held", reason=f"{held}; else: {decision.reason}"), None
        if decision.outcome != "order" or found is None:
            return self._keep(engine, decision)
        wanted = copies_of(found.plan.replicas)
        self._check_fits(engine, wanted)
        self._order(engine, wanted, LLEP, decision.reason, decision)
        self._said[(name, "placement")] = (decision.outcome, time.monotonic())

    def _held_placement(self, name: str) -> str:
        """Why llep leaves the placement alone: a person ordered it lately. '' if not so. Raises StoreUnavailable."""
        newest = self._journal.placements(name, 1)
        if not newest or newest[0].author == LLEP:
            return ""
        left_s = newest[0].time_s + HELD_FOR_PEOPLE_S - time.time()
        if not 0.0 < left_s <= HELD_FOR_PEOPLE_S:
            return ""
        return (
            f"{newest[0].author} ordered placement {newest[0].number}, which is left alone for another {left_s:.0f} s"
        )

    def _keep(self, engine: Engine, decision: Decision) -> None:
        """Store a decision that changes nothing, if it is another than before."""
        key, now_s = (engine.info.engine, decision.kind), time.monotonic()
        said, said_s = self._said.get(key, ("", -math.inf))
        says = f"{decision.outcome} {decision.patch}"
        if says != said or now_s - said_s > SAID_AGAIN_S:
            self._said[key] = (says, now_s)
            self._journal.decide(stored_decision(engine.info.engine, decision, time.time(), None))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
