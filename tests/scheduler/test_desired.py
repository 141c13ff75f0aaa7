"""Overrides say what a replay of all changes says, in every order of changes, engines and times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llep.config import Settings
from llep.errors import SettingsError
from llep.messages import PlacementOrder
from llep.scheduler.desired import LONGEST_TTL_S, Desired, adopted_patch, canonical, difference, sources

ENGINES = ("a", "b", "c")
MODES = ("off", "observe", "shadow", "active")
START = Settings(mode="shadow", imbalance_threshold=1.5)


@dataclass(frozen=True)
class Made:
    """A change as somebody made it."""

    patch: dict[str, Any]
    engines: tuple[str, ...] | None
    until_s: float | None


some_engines = st.none() | st.sets(st.sampled_from(ENGINES), min_size=1).map(lambda names: tuple(sorted(names)))
permanent = st.builds(
    Made,
    st.fixed_dictionaries(
        {}, optional={"mode": st.none() | st.sampled_from(MODES), "watchdog_s": st.none() | st.just(9)}
    ),
    some_engines,
    st.none(),
)
temporary = st.builds(
    Made, st.fixed_dictionaries({"mode": st.sampled_from(MODES)}), some_engines, st.sampled_from([10.0, 20.0, 30.0])
)


def replay(history: list[Made], engine: str, key: str, now_s: float) -> Any:
    """The definition: what holds for an engine is what was last said about it."""
    value, every, own = None, None, None  # what holds, and the temporary changes over it
    for made in history:
        if key not in made.patch or (made.engines is not None and engine not in made.engines):
            continue
        if made.until_s is None:
            value, every, own = made.patch[key], None, None
        elif made.engines is None:
            every, own = made, None
        else:
            own = made
    for made in (own, every):
        if made is not None and made.until_s is not None and made.until_s > now_s:
            return made.patch[key]
    return getattr(START, key) if value is None else value


@example(
    [Made({"mode": "off"}, None, 20.0), Made({"mode": None}, ("a",), None), Made({"mode": "off"}, ("a",), 10.0)], 10.0
)
@given(st.lists(permanent | temporary, max_size=8), st.sampled_from([5.0, 10.0, 15.0, 25.0, 35.0]))
def test_equals_a_replay_of_all_changes(history: list[Made], now_s: float) -> None:
    desired = Desired()
    for revision, made in enumerate(history, start=1):
        desired = desired.changed(made.patch, made.engines, revision, made.until_s)
    kept = desired.without_expired(now_s, len(history) + 1)
    assert (kept == desired) == (desired.expired(now_s) is None)
    assert kept.expired(now_s) is None
    for engine in ENGINES:
        effective = kept.effective(engine, START)
        for key in ("mode", "watchdog_s"):
            assert getattr(effective, key) == replay(history, engine, key, now_s)
        addressed = [n for n, made in enumerate(history, start=1) if made.engines is None or engine in made.engines]
        assert desired.revision_of(engine) == max(addressed, default=0)
        if kept.effective(engine, START) != desired.effective(engine, START):
            assert kept.revision_of(engine) == len(history) + 1
    assert msgspec.json.decode(msgspec.json.encode(kept), type=Desired) == kept


def test_a_temporary_mode_goes_back_to_the_last_that_was_not() -> None:
    desired = Desired().changed({"mode": "observe"}, None, 1).changed({"mode": "off"}, None, 2, 100.0)
    desired = desired.changed({"mode": "active"}, None, 3, 50.0)
    assert desired.expired(49.0) is None and desired.next_expiry_s("a") == 50.0
    assert desired.expired(50.0) == ({"mode": None}, None)
    assert desired.without_expired(50.0, 4).effective("a", START).mode == "observe"


def test_a_clock_set_back_by_years_ends_what_was_for_a_time() -> None:
    desired = Desired().changed({"mode": "off"}, None, 1, 1e9)
    assert desired.expired(1e9 - LONGEST_TTL_S) is None
    assert desired.expired(1e9 - 3e8) == ({"mode": None}, None)
    assert desired.without_expired(1e9 - 3e8, 2).effective("a", START).mode == "shadow"


def test_an_engine_can_be_taken_out_of_what_holds_for_all() -> None:
    desired = Desired().changed({"watchdog_s": 9}, None, 1).changed({"watchdog_s": None}, ["a"], 2)
    assert desired.effective("a", START).watchdog_s == START.watchdog_s
    assert desired.effective("b", START).watchdog_s == 9
    assert desired.effective(None, Settings()).watchdog_s == 9
    assert sources(desired, "a", {})["watchdog_s"] == "default"
    assert sources(desired, "b", {"mode": "environment"}) | {} == {
        **dict.fromkeys(Settings.model_fields, "default"),
        **{"watchdog_s": "revision 1", "mode": "environment"},
    }


def test_saying_the_same_again_changes_nothing() -> None:
    desired = Desired().changed({"watchdog_s": 9}, None, 1)
    assert desired.changed({"watchdog_s": 9}, None, 2).says_the_same_as(desired)
    assert desired.changed({}, None, 2).says_the_same_as(desired)
    assert desired.changed({"mode": None}, ["a"], 2).says_the_same_as(desired)
    assert not desired.changed({"watchdog_s": 9}, ["a"], 2).says_the_same_as(desired)
    assert not desired.changed({"watchdog_s": 10}, None, 2).says_the_same_as(desired)


def test_a_difference_shows_where_engines_differ() -> None:
    before = {"b": Settings(watchdog_s=7), "a": Settings()}
    after = {name: settings.changed({"watchdog_s": 9}) for name, settings in before.items()}
    assert difference(before, after) == {"watchdog_s": [{"a": 60, "b": 7}, 9]}


def test_values_have_one_form() -> None:
    assert canonical({"layers": [3, "4-5", 0], "mode": "off", "watchdog_s": None}) == {
        **{"layers": "0,3-5", "mode": "off", "watchdog_s": None}
    }


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"imbalance_treshold": 2}, "did you mean 'imbalance_threshold'"),
        ({"imbalance_treshold": None}, "did you mean 'imbalance_threshold'"),
        ({"slots_per_rank": 2}, "can't change while serving"),
        ({"slots_per_rank": None}, "can't change while serving"),
        ({"imbalance_threshold": 0.9}, "imbalance_threshold=0.9 is not valid"),
        ({"mode": "sideways"}, "mode='sideways' is not valid"),
    ],
)
def test_what_can_not_be_is_named(patch: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        canonical(patch)
    assert error.value.param == next(iter(patch))


def test_adopting_what_an_engine_runs_gives_it_back() -> None:
    live = START.changed({"mode": "off", "layers": "1-3", "watchdog_s": 9})
    every = Desired().changed({"watchdog_s": 11, "min_batch_tokens": 5}, None, 1)
    adopted = every.changed(adopted_patch(live.dump(), START), ["a"], 2)
    assert adopted.effective("a", START) == live
    assert adopted.effective("b", START) == START.changed({"watchdog_s": 11, "min_batch_tokens": 5})


def test_overrides_of_another_version_are_left_out() -> None:
    desired = Desired(revision=1).changed({"watchdog_s": 9, "no_longer": 1, "slots_per_rank": 2}, None, 1)
    assert desired.of_known_keys().effective("a", START) == START.changed({"watchdog_s": 9})


def test_what_is_said_of_engines_that_are_gone_is_bounded() -> None:
    desired = Desired()
    for number in range(1, 11):
        desired = desired.changed({"watchdog_s": number}, [f"engine-{number}"], number)
        desired = desired.placed(f"engine-{number}", PlacementOrder(number, ((0, 0, 1),), 1), number)
    kept = desired.without_those_away({"engine-1"}, 3)
    assert kept.permanent.keys() == kept.placements.keys() == {"engine-1", "engine-8", "engine-9", "engine-10"}
    assert kept.addressed.keys() == kept.permanent.keys() and kept.revision == 10
    assert desired.without_those_away({"engine-1"}, 9) is desired
