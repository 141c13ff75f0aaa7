"""Settings: where they come from, what they refuse and how they say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llep.config import Mode, Settings, is_hot, layer_numbers, load_settings, parse_assignments
from llep.errors import SettingsError


def test_every_key_has_a_description_and_says_whether_it_is_hot() -> None:
    for key, field in Settings.model_fields.items():
        assert field.description, key
        assert is_hot(key) in (True, False)
    assert not is_hot("slots_per_rank") and is_hot("mode")


def test_defaults_are_valid_and_plain_json() -> None:
    values = Settings().dump()
    assert Settings.parse(json.loads(json.dumps(values))) == Settings()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"imbalance_treshold": 2}, "unknown setting 'imbalance_treshold'; did you mean 'imbalance_threshold'?"),
        ({"imbalance_threshold": 0.99}, "imbalance_threshold=0.99 is not valid: input should be greater than or equal"),
        ({"imbalance_threshold": 101}, "less than or equal to 100"),
        ({"imbalance_threshold": float("nan")}, "finite number"),
        ({"capacity_factor": float("inf")}, "finite number"),
        ({"mode": "on"}, "mode='on' is not valid: input should be 'off', 'observe', 'shadow' or 'active'"),
        ({"planner": "best"}, "planner='best' is not valid"),
        ({"min_chunk_tokens": 1.5}, "min_chunk_tokens=1.5 is not valid"),
        ({"min_chunk_tokens": 0}, "(default 1024)"),
        ({"layers": "5-3"}, "layers='5-3' is not valid: '5-3' is neither 'all' nor a layer number nor a range"),
        ({"layers": ""}, "neither 'all'"),
        ({"layers": "1-"}, "neither 'all'"),
        ({"imbalance_threshold": True}, "imbalance_threshold=True is not valid: input should be a number"),
        ({"min_chunk_tokens": True}, "input should be a number"),
        ({"layers": []}, "at least one layer"),
        ({"layers": "0-99999"}, "above the highest layer number"),
        ({"slots_per_rank": -1}, "greater than or equal to 0"),
    ],
)
def test_refusals_name_value_rule_and_way_out(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.parse(values)
    assert words in caught.value.message
    assert caught.value.param == next(iter(values))


@pytest.mark.parametrize(
    ("given_", "kept"),
    [("all", "all"), ("3", "3"), (7, "7"), ("7,3-5, 4", "3-5,7"), ([0, "3-4", 5], "0,3-5"), ("0-0", "0")],
)
def test_layers_have_one_form(given_: Any, kept: str) -> None:
    settings = Settings.parse({"layers": given_})
    assert settings.layers == kept
    assert Settings.parse({"layers": kept}) == settings


@given(st.sets(st.integers(0, 9999), min_size=1))
def test_layers_keep_just_the_numbers_given(numbers: set[int]) -> None:
    assert layer_numbers(Settings.parse({"layers": sorted(numbers)}).layers) == numbers


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "llep.yaml"
    file.write_text("imbalance_threshold: 1.5\ncapacity_factor: 1.5\nwatchdog_s: 90\n")
    environ = {"LLEP_CONFIG": str(file), "LLEP_CAPACITY_FACTOR": "2", "LLEP_WATCHDOG_S": "30", "PATH": "/bin"}
    settings, sources = load_settings({"watchdog_s": 15}, environ)
    assert (settings.imbalance_threshold, settings.capacity_factor, settings.watchdog_s) == (1.5, 2.0, 15)
    assert sources["imbalance_threshold"] == f"file {file}"
    assert sources["capacity_factor"] == "environment"
    assert sources["watchdog_s"] == "additional-config"
    assert sources["mode"] == "default"
    assert sources.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"LLEP_MODE": "of"}, "environment: mode='of' is not valid"),
        ({"LLEP_MOED": "off"}, "environment: unknown setting 'moed'; did you mean 'mode'?"),
        ({"LLEP_CONFIG": "/nowhere.yaml"}, "LLEP_CONFIG=/nowhere.yaml can't be read"),
    ],
)
def test_bad_environment(environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ=environ)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("content", "words"),
    [("- mode\n", "must hold 'key: value' lines, got list"), ("mode: [", "can't be read"), ("mode: of\n", "mode='of'")],
)
def test_bad_files(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "llep.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={"LLEP_CONFIG": str(file)})
    assert words in caught.value.message and str(file) in caught.value.message


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "llep.yaml").touch()
    assert load_settings(environ={"LLEP_CONFIG": str(tmp_path / "llep.yaml")})[0] == Settings()


def test_a_bare_off_in_a_file_is_the_word(tmp_path: Path) -> None:
    file = tmp_path / "llep.yaml"
    file.write_text("mode: off\nreplicas: off\nmetrics_level: off\nauto_tune: off\n")
    settings, _ = load_settings(environ={"LLEP_CONFIG": str(file)})
    assert (settings.mode, settings.replicas, settings.metrics_level, settings.auto_tune) == (
        "off",
        "off",
        "off",
        False,
    )
    file.write_text("watchdog_s: off")
    with pytest.raises(SettingsError, match="watchdog_s=False is not valid: input should be a number"):
        load_settings(environ={"LLEP_CONFIG": str(file)})


def test_where_things_are_is_not_a_setting() -> None:
    environ = {
        name: "x"
        for name in (
            *(
                "LLEP_SERVER",
                "LLEP_KEY_FILE",
                "LLEP_STATE_DIR",
                "LLEP_RAY_ADDRESS",
                "LLEP_RAY_NAMESPACE",
                "LLEP_ENGINE",
            ),
            *("LLEP_SERVER_HOST", "LLEP_SERVER_PORT", "LLEP_SERVER_KEYS_FILE", "LLEP_SERVER_STATE_DIR"),
            "LLEP_SERVER_INSECURE",
        )
    }
    assert load_settings(environ=environ)[0] == Settings()


def test_changes() -> None:
    settings = Settings.parse({"imbalance_threshold": 2, "slots_per_rank": 8})
    changed = settings.changed({"mode": "off", "imbalance_threshold": None})
    assert (changed.mode, changed.imbalance_threshold, changed.slots_per_rank) == (Mode.OFF, 1.3, 8)
    assert settings.imbalance_threshold == 2  # frozen
    with pytest.raises(SettingsError, match="slots_per_rank can't change while serving: set it at start"):
        settings.changed({"slots_per_rank": 2})
    with pytest.raises(SettingsError, match="unknown setting"):
        settings.changed({"mod": "off"})


def test_assignments() -> None:
    patch = parse_assignments(["mode=off", "layers=0,3-7", "capacity_factor=1.5", "watchdog_s=null", "planner=a=b"])
    assert patch == {"mode": "off", "layers": "0,3-7", "capacity_factor": 1.5, "watchdog_s": None, "planner": "a=b"}
    with pytest.raises(SettingsError, match="'mode' is not of the form key=value"):
        parse_assignments(["mode"])
    for value in ("NaN", "-Infinity", "1e999", "[0, NaN]"):
        with pytest.raises(SettingsError, match="imbalance_threshold=.* is not valid: it must be finite"):
            parse_assignments([f"imbalance_threshold={value}"])
