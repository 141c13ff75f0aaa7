"""What each engine should run: sparse overrides over its start-up settings, as a pure function of the changes made."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import msgspec

from llep.config import Settings, is_hot
from llep.errors import SettingsError
from llep.messages import PlacementOrder, RecordingOrder

LONGEST_TTL_S = 30 * 86400.0  # of a change for a time
EVERY = ""  # the target of a change that addresses all engines, also those still to come


class Override(msgspec.Struct, frozen=True):
    """A value that somebody set at run time. value None: this engine is exempt from what EVERY says."""

    value: Any
    revision: int
    until_s: float | None = None  # unix time
    exempt_until_s: float | None = None  # when this ends before that time, the engine is exempt until then
    by_llep: bool = False  # set by the scheduler itself, not by a person


Layer = dict[str, dict[str, Override]]  # target (engine or EVERY) -> key -> override


class Desired(msgspec.Struct, frozen=True):
    """All overrides in force. `temporary` lies over `permanent`; in both, an engine's own lies over EVERY's.

    A change to all engines removes the engines' own overrides of its keys, so an engine's own is always the newer one.
    """

    revision: int = 0
    addressed: dict[str, int] = {}  # target -> newest revision that addressed it
    permanent: Layer = {}
    temporary: Layer = {}
    placements: dict[str, PlacementOrder] = {}  # by engine
    recordings: dict[str, RecordingOrder] = {}

    def revision_of(self, engine: str | None) -> int:
        """The revision that the engine should run; 0 is as started."""
        own = 0 if engine is None else self.addressed.get(engine, 0)
        return max(self.addressed.get(EVERY, 0), own)

    def overrides_of(self, engine: str | None) -> dict[str, Override]:
        """The overrides in force for an engine, or for one that would start now."""
        return {**_in_force(self.permanent, engine), **_in_force(self.temporary, engine)}

    def effective(self, engine: str | None, start: Settings) -> Settings:
        """Start-up settings with the overrides. Raises SettingsError if the two don't go together."""
        return start.changed({key: override.value for key, override in self.overrides_of(engine).items()})

    def changed(
        self,
        patch: Mapping[str, Any],
        engines: Sequence[str] | None,
        revision: int,
        until_s: float | None = None,
        *,
        by_llep: bool = False,
    ) -> Desired:
        """With a canonical patch laid over; None takes a key's override away. engines None: all, also those to come.

        With until_s the patch is temporary. Without, it also ends what was temporary about its keys.
        """
        permanent, temporary = copy.deepcopy(self.permanent), copy.deepcopy(self.temporary)
        for key, value in patch.items():
            if until_s is None:
                _put(permanent, key, Override(value, revision, by_llep=by_llep), engines)
                _put(temporary, key, Override(None, revision, _until(temporary, key), by_llep=by_llep), engines)
            else:
                _put(temporary, key, Override(value, revision, until_s, by_llep=by_llep), engines)
        targets = [EVERY] if engines is None else engines
        addressed = {**self.addressed, **dict.fromkeys(targets, revision)}
        return msgspec.structs.replace(
            self,
            revision=revision,
            addressed=addressed,
            permanent=_without_empty(permanent),
            temporary=_without_empty(temporary),
        )

    def placed(self, engine: str, order: PlacementOrder | None, revision: int) -> Desired:
        """With the resident replicas of an engine ordered anew; None: it shall have none."""
        others = {name: placement for name, placement in self.placements.items() if name != engine}
        return msgspec.structs.replace(
            self,
            revision=revision,
            addressed={**self.addressed, engine: revision},
            placements={**others, engine: order} if order is not None else others,
        )

    def recorded(self, engine: str, order: RecordingOrder | None, revision: int) -> Desired:
        """With a recording ordered on an engine; None: no more."""
        others = {name: recording for name, recording in self.recordings.items() if name != engine}
        return msgspec.structs.replace(
            self,
            revision=revision,
            addressed={**self.addressed, engine: revision},
            recordings={**others, engine: order} if order is not None else others,
        )

    def without_those_away(self, known: Set[str], most: int) -> Desired:
        """With what is said of engines that aren't known left out, but for the `most` that were addressed last."""
        layers = (self.addressed, self.permanent, self.temporary, self.placements, self.recordings)
        away = sorted(set().union(*layers) - known - {EVERY}, key=lambda name: self.addressed.get(name, 0))
        left_out = set(away[: max(len(away) - most, 0)])
        if not left_out:
            return self
        names = ("addressed", "permanent", "temporary", "placements", "recordings")
        kept = ({name: value for name, value in layer.items() if name not in left_out} for layer in layers)
        return msgspec.structs.replace(self, **dict(zip(names, kept, strict=True)))

    def put_back(self, earlier: Desired, revision: int, now_s: float) -> Desired:
        """With the settings of an earlier state, but for what was temporary then and is over by now."""
        kept = earlier.without_expired(now_s, revision)
        return msgspec.structs.replace(
            self,
            revision=revision,
            addressed={EVERY: revision},
            permanent=kept.permanent,
            temporary=kept.temporary,
        )

    def expired(self, now_s: float) -> tuple[dict[str, Any], list[str] | None] | None:
        """(patch of Nones, engines) of the temporary overrides whose time is over; None if there are none."""
        over = {
            (target, key)
            for target, overrides in self.temporary.items()
            for key, override in overrides.items()
            if _is_over(override, now_s)
        }
        if not over:
            return None
        targets = sorted({target for target, _ in over})
        return {key: None for _, key in sorted(over)}, None if EVERY in targets else targets

    def without_expired(self, now_s: float, revision: int) -> Desired:
        """With the temporary overrides whose time is over taken away."""
        found = self.expired(now_s)
        if found is None:
            return self
        targets = [EVERY] if found[1] is None else found[1]
        kept = {
            target: {key: left for key, o in overrides.items() if (left := _left_at(o, now_s)) is not None}
            for target, overrides in self.temporary.items()
        }
        addressed = {**self.addressed, **dict.fromkeys(targets, revision)}
        return msgspec.structs.replace(self, revision=revision, addressed=addressed, temporary=_without_empty(kept))

    def moved_in_time(self, seconds: float, revision: int) -> Desired:
        """With the ends of what is temporary moved; no engine runs anything else for that."""
        temporary = {
            target: {key: _moved(override, seconds) for key, override in overrides.items()}
            for target, overrides in self.temporary.items()
        }
        return msgspec.structs.replace(self, revision=revision, temporary=temporary)

    def next_expiry_s(self, engine: str | None) -> float | None:
        """Unix time at which the first temporary override of the engine ends."""
        times = [o.until_s for o in _in_force(self.temporary, engine).values() if o.until_s is not None]
        return min(times, default=None)

    def says_the_same_as(self, other: Desired) -> bool:
        """Whether the two hold the same values, set by llep or by people alike, whatever their revisions."""
        return (
            _values(self.permanent) == _values(other.permanent)
            and _timed(self.temporary) == _timed(other.temporary)
            and self.placements == other.placements
            and self.recordings == other.recordings
        )

    def of_known_keys(self) -> Desired:
        """Without overrides of keys that this version of llep doesn't have or no longer lets change while serving."""
        return msgspec.structs.replace(
            self, permanent=_of_known_keys(self.permanent), temporary=_of_known_keys(self.temporary)
        )


def canonical(patch: Mapping[str, Any]) -> dict[str, Any]:
    """A merge patch with its values in their one form. Raises SettingsError: unknown, cold, mistyped, out of range."""
    for key in patch:
        if key not in Settings.model_fields:
            Settings.parse({key: patch[key]})  # raises, naming the nearest key
    values = Settings().changed(patch).dump()
    return {key: None if value is None else values[key] for key, value in patch.items()}


def is_of_settings(patch: Mapping[str, Any]) -> bool:
    """Whether a revision's patch changes settings; others order placements or recordings."""
    return "rollback" in patch or not Settings.model_fields.keys().isdisjoint(patch)


def sources(desired: Desired, engine: str | None, at_start: Mapping[str, str]) -> dict[str, str]:
    """Where each key's value comes from: 'revision N', or its source at start."""
    changed = {key: f"revision {o.revision}" for key, o in desired.overrides_of(engine).items()}
    return {key: changed.get(key, at_start.get(key, "default")) for key in Settings.model_fields}


def difference(before: Mapping[str, Settings], after: Mapping[str, Settings]) -> dict[str, list[Any]]:
    """key -> [before, after] over engines; where engines differ, a side is a mapping from engine to value."""
    old, new = ({engine: values.dump() for engine, values in sorted(side.items())} for side in (before, after))
    changed = [key for key in Settings.model_fields if any(old[engine][key] != new[engine][key] for engine in new)]
    return {key: [_common(old, key), _common(new, key)] for key in changed}


def adopted_patch(live: Mapping[str, Any], start: Settings) -> dict[str, Any]:
    """The patch that makes `live` out of start-up settings. Raises SettingsError if `live` is not valid."""
    values, base = Settings.parse(live).dump(), start.dump()
    return {key: values[key] if values[key] != base[key] else None for key in values if is_hot(key)}


def check_engines(engines: Sequence[str] | None) -> None:
    """Raises SettingsError for an empty list: that is neither all nor any."""
    if engines is not None and not engines:
        raise SettingsError("engines=[] addresses nobody: leave it out for all engines, or name some", param="engines")


def _in_force(layer: Layer, engine: str | None) -> dict[str, Override]:
    own = {} if engine is None else layer.get(engine, {})
    return {key: o for key, o in {**layer.get(EVERY, {}), **own}.items() if o.value is not None}


def _put(layer: Layer, key: str, override: Override, engines: Iterable[str] | None) -> None:
    if engines is None:
        for overrides in layer.values():
            overrides.pop(key, None)
        if override.value is not None:
            layer.setdefault(EVERY, {})[key] = override
        return
    for engine in engines:
        if override.value is None and key not in layer.get(EVERY, {}):
            layer.get(engine, {}).pop(key, None)
        else:
            own = layer.setdefault(engine, {})
            own[key] = override if override.value is None else _over(override, own.get(key))


def _over(override: Override, beneath: Override | None) -> Override:
    """An engine's override, laid over the one that it had: an exemption holds again when the new one ends."""
    if beneath is None:
        return override
    exempt_until_s = beneath.until_s if beneath.value is None else beneath.exempt_until_s
    return msgspec.structs.replace(override, exempt_until_s=exempt_until_s)


def _moved(override: Override, seconds: float) -> Override:
    until_s, exempt_until_s = (
        None if at_s is None else at_s + seconds for at_s in (override.until_s, override.exempt_until_s)
    )
    return msgspec.structs.replace(override, until_s=until_s, exempt_until_s=exempt_until_s)


def _is_over(override: Override, now_s: float) -> bool:
    """Also where the clock was set back so far that it would hold for longer than anybody may ask for."""
    return override.until_s is not None and not now_s < override.until_s <= now_s + LONGEST_TTL_S + 1.0


def _left_at(override: Override, now_s: float) -> Override | None:
    """What is left of an override at that time."""
    if not _is_over(override, now_s):
        return override
    if override.exempt_until_s is not None and override.exempt_until_s > now_s:
        return Override(None, override.revision, override.exempt_until_s)
    return None


def _until(temporary: Layer, key: str) -> float | None:
    """An exemption from EVERY's temporary value ends with it."""
    every = temporary.get(EVERY, {}).get(key)
    return every.until_s if every else None


def _without_empty(layer: Layer) -> Layer:
    return {target: overrides for target, overrides in layer.items() if overrides}


def _of_known_keys(layer: Layer) -> Layer:
    return _without_empty(
        {
            target: {key: o for key, o in overrides.items() if key in Settings.model_fields and is_hot(key)}
            for target, overrides in layer.items()
        }
    )


def _values(layer: Layer) -> dict[tuple[str, str], Any]:
    return {(target, key): (o.value, o.by_llep) for target, overrides in layer.items() for key, o in overrides.items()}


def _timed(layer: Layer) -> dict[tuple[str, str], Any]:
    return {
        (target, key): (o.value, o.until_s, o.by_llep)
        for target, overrides in layer.items()
        for key, o in overrides.items()
    }


def _common(dumps: Mapping[str, Mapping[str, Any]], key: str) -> Any:
    values = {engine: dump[key] for engine, dump in dumps.items()}
    first, *others = values.values()
    return first if all(value == first for value in others) else values
