"""The part of the Scheduler that orders resident replicas: shown, suggested, applied, and taken one step back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llep.config import Replicas, Settings
from llep.errors import PlacementRefused
from llep.messages import PlacementOrder
from llep.planning.replicas import Replica
from llep.scheduler.changes import check_texts
from llep.scheduler.core import Core
from llep.scheduler.decide import Decision
from llep.scheduler.decide_placement import NO_ROOM, Ground, Suggestion, refusal, room, suggest, suggest_with_room
from llep.scheduler.show_loads import ground_of, placement_window_s
from llep.scheduler.store import NewDecision, NewEvent, StoredPlacement
from llep.scheduler.windows import Engine
from llep.views import EventKind, PlacementSuggestion, PlacementView, ReplicaView, RoomView

Copies = tuple[tuple[int, int, int], ...]  # place of the layer, expert, rank


class Placements(Core):
    """A placement is a revision like any other: stored before it is acknowledged, switched on at one step."""

    async def placement(self, engine: str | None = None) -> list[dict[str, Any]]:
        """PlacementView of one engine or all. Raises UnknownEngine."""
        self._tick()
        chosen = [self._engine(engine)] if engine else [e for _, e in sorted(self._windows.engines.items())]
        return [self._placement_view(each).model_dump(mode="json") for each in chosen]

    async def placement_suggest(self, engine: str) -> dict[str, Any]:
        """PlacementSuggestion: what the scheduler would do now. Raises UnknownEngine, PlacementRefused."""
        self._tick()
        known = self._engine(engine)
        ground = self._ground(known)
        found = await asyncio.to_thread(suggest, ground)
        with_room = None if known.info.replica_slots_per_rank else await asyncio.to_thread(suggest_with_room, ground)
        return _suggestion_view(known, found, with_room).model_dump(mode="json")

    async def placement_apply(
        self,
        engine: str,
        author: str,
        reason: str = "",
        replicas: Sequence[Any] | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Order these replicas, [{layer, expert, rank}, ...] with the model's layer numbers, or what is suggested.

        Answers the PlacementView after it. Raises UnknownEngine, PlacementRefused, SettingsError, StoreUnavailable.
        """
        await self._hear_first()
        self._tick()
        check_texts(author, reason)
        known = self._engine(engine)
        if self._settings_of(known).replicas is Replicas.OFF:
            raise self._refused_order("off: replicas is off on this engine: set it to suggest or apply first")
        if replicas is None:
            found = await asyncio.to_thread(suggest, self._ground(known))
            wanted: Copies = copies_of(found.plan.replicas)
        else:
            wanted = self._parsed(known, replicas)
        return self._ordered(known, wanted, author, reason or "asked for", dry_run)

    async def placement_rollback(self, engine: str, author: str, reason: str = "") -> dict[str, Any]:
        """Order the placement that was ordered before the present one; none where there was none.

        Answers PlacementView. Raises UnknownEngine, PlacementRefused, StoreUnavailable.
        """
        await self._hear_first()
        self._tick()
        check_texts(author, reason)
        known = self._engine(engine)
        ordered = self._journal.placements(engine, 2)
        if not ordered:
            raise self._refused_order(f"no_placement: engine {engine} has never had a placement to go back from")
        before = ordered[1].replicas if len(ordered) > 1 else ()
        return self._ordered(known, before, author, reason or f"back from placement {ordered[0].number}", False)

    def _ordered(self, engine: Engine, wanted: Copies, author: str, reason: str, dry_run: bool) -> dict[str, Any]:
        self._check_fits(engine, wanted)
        if wanted != self._present(engine) and not dry_run:
            self._order(engine, wanted, author, reason)
        if dry_run:
            return self._placement_view(engine, wanted).model_dump(mode="json")
        return self._placement_view(engine).model_dump(mode="json")

    def _order(
        self, engine: Engine, wanted: Copies, author: str, reason: str, decision: Decision | None = None
    ) -> None:
        """Raises StoreUnavailable; then nothing has changed."""
        name, now_s, revision = engine.info.engine, time.time(), self._next_revision()
        settings = self._settings_of(engine)
        order = PlacementOrder(revision, wanted, settings.replica_bytes_per_s) if wanted else None
        before = set(self._present(engine))
        added, dropped = len(set(wanted) - before), len(before - set(wanted))
        message = f"engine {name}: {len(wanted)} resident replicas, {added} new, {dropped} dropped: {reason}"
        data = {"revision": revision, "replicas": len(wanted), "added": added, "dropped": dropped}
        event = NewEvent(kind=EventKind.PLACEMENT, message=message, time_s=now_s, engine=name, author=author, data=data)
        self._commit(
            self._journal.desired.placed(name, order, revision),
            event,
            author=author,
            reason=reason,
            engines=[name],
            patch={"placement": {"replicas": len(wanted), "added": added, "dropped": dropped}},
            decision=None if decision is None else stored_decision(name, decision, now_s, revision),
            placement=StoredPlacement(
                number=revision, time_s=now_s, engine=name, author=author, reason=reason, replicas=wanted
            ),
        )

    # What decisions are made from.

    def _ground(self, engine: Engine) -> Ground:
        """Raises PlacementRefused before rank 0 has reported."""
        home_rank_LE = engine.home_rank_LE
        if home_rank_LE is None or engine.totals.is_empty:
            raise self._refused_order("no_report: rank 0 of this engine has not reported yet")
        present = (Replica(*copy) for copy in self._present(engine))
        return ground_of(
            engine,
            self._settings_of(engine),
            present,
            self._room(engine),
            time.monotonic(),
            self._interval_s(engine),
        )

    def _room(self, engine: Engine) -> tuple[int, ...]:
        """Copies that each rank has room for. Elsewhere than on a CPU all slots are taken from the start."""
        info, R = engine.info, engine.info.ep_size
        held_R = np.bincount([rank for _, _, rank in self._present(engine)], minlength=R).tolist()
        is_live = info.backend == "cpu"
        reports = [engine.reports.get(rank) for rank in range(R)]
        free_R = [report.device_free_bytes if report else 0 for report in reports]
        total_R = [report.device_total_bytes if report and is_live else 0 for report in reports]
        return room(info.replica_slots_per_rank, held_R, free_R, total_R, info.bytes_per_slot)

    def _present(self, engine: Engine) -> Copies:
        """Those that are ordered, whether they are filled yet or not."""
        order = self._journal.desired.placements.get(engine.info.engine)
        return order.replicas if order else ()

    def _settings_of(self, engine: Engine) -> Settings:
        """Those that the engine should run. Raises SettingsError."""
        return self._journal.desired.effective(engine.info.engine, engine.start)

    def _check_fits(self, engine: Engine, wanted: Copies) -> None:
        home_rank_LE = engine.home_rank_LE
        if home_rank_LE is None:
            raise self._refused_order("no_report: rank 0 of this engine has not reported yet")
        problem = refusal(wanted, home_rank_LE.astype(np.int64), self._room(engine))
        if problem:
            raise self._refused_order(problem)

    def _parsed(self, engine: Engine, replicas: Sequence[Any]) -> Copies:
        places = {number: place for place, number in enumerate(engine.info.layer_numbers)}
        found = []
        for replica in replicas:
            try:
                values = (replica[key] for key in ("layer", "expert", "rank")) if isinstance(replica, dict) else replica
                layer, expert, rank = map(int, values)
            except (KeyError, TypeError, ValueError):
                raise self._refused_order(f"garbled: {replica!r} is not {{layer, expert, rank}} of integers") from None
            if layer not in places:
                raise self._refused_order(f"unknown_layer: {layer} is not the number of a MoE layer of this engine")
            copy = places[layer], expert, rank
            found.append(copy)
        return tuple(sorted(found))

    def _refused_order(self, problem: str) -> PlacementRefused:
        self._orders_refused[problem.partition(":")[0]] += 1
        return PlacementRefused(problem, param="replicas")

    # How it looks.

    def _placement_view(self, engine: Engine, wanted: Copies | None = None) -> PlacementView:
        order = self._journal.desired.placements.get(engine.info.engine)
        number = order.number if order else 0
        copies = wanted if wanted is not None else self._present(engine)
        info = engine.info
        state = "none"
        if number and engine.live_placement == number:
            state = "live"
        elif number:
            state = "filling" if engine.live_revision >= number else "ordered"
        return PlacementView(
            engine=info.engine,
            replicas_setting=str(self._settings_of(engine).replicas),
            number=number,
            live_number=engine.live_placement,
            state=state,
            filled=len(copies) if state == "live" else min(engine.filled_placement, len(copies)),
            replicas=_replica_views(engine, copies),
            slots_per_rank=info.replica_slots_per_rank,
            used_slots=np.bincount([rank for _, _, rank in copies], minlength=info.ep_size).tolist(),
            bytes_per_slot=info.bytes_per_slot,
            problem="" if info.replica_slots_per_rank else NO_ROOM,
        )


def copies_of(replicas: Iterable[Replica]) -> Copies:
    return tuple(sorted((layer, expert, rank) for layer, expert, rank in replicas))


def stored_decision(engine: str, decision: Decision, now_s: float, revision: int | None) -> NewDecision:
    return NewDecision(
        time_s=now_s,
        engine=engine,
        kind=decision.kind,
        outcome=decision.outcome,
        reason=decision.reason,
        expected_gain_ratio=decision.expected_gain_ratio,
        inputs={**decision.inputs, **({"patch": decision.patch} if decision.patch else {})},
        revision=revision,
    )


def _suggestion_view(engine: Engine, found: Suggestion, with_room: Suggestion | None) -> PlacementSuggestion:
    plan = found.plan
    replicas, added, dropped = (
        _replica_views(engine, copies_of(copies)) for copies in (plan.replicas, plan.added, plan.dropped)
    )
    return PlacementSuggestion(
        engine=engine.info.engine,
        replicas=replicas,
        added=added,
        dropped=dropped,
        imbalance_ratio_before=found.before,
        imbalance_ratio_after=found.after,
        move_bytes=found.move_bytes,
        move_s=found.move_s,
        saving_s=found.saving_s,
        horizon_s=found.horizon_s,
        is_worth_it=found.is_worth_it,
        reason=found.reason if engine.info.replica_slots_per_rank else NO_ROOM,
        with_room=_room_view(engine, with_room) if with_room else None,
    )


def _room_view(engine: Engine, found: Suggestion) -> RoomView:
    slots_per_rank = len(engine.info.layer_numbers)
    return RoomView(
        slots_per_rank=slots_per_rank,
        bytes_per_rank=slots_per_rank * engine.info.bytes_per_slot,
        replicas=len(found.plan.replicas),
        imbalance_ratio_before=found.before,
        imbalance_ratio_after=found.after,
        saving_s=found.saving_s,
        is_worth_it=found.is_worth_it,
    )


def _replica_views(engine: Engine, copies: Copies) -> list[ReplicaView]:
    shares = None
    if not engine.totals.is_empty and copies:
        _, routed_PLE, *_ = engine.totals.experts(placement_window_s(engine))
        routed_LE = routed_PLE.sum(axis=0)
        shares = routed_LE / np.maximum(routed_LE.sum(axis=1, keepdims=True), 1)
    return [
        ReplicaView(
            layer=engine.info.layer_numbers[layer],
            expert=expert,
            rank=rank,
            share=None if shares is None else float(shares[layer, expert]),
        )
        for layer, expert, rank in copies
    ]
