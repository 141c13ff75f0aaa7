"""What the commands make of what people type and of what the control plane answers, without either."""

from __future__ import annotations

import json

import pytest

from llep.cli.control import _revision, parse_duration, show_change
from llep.cli.output import Format, show
from llep.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1.5h", 5400),
        (" 5m ", 300),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--ttl", text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10x", "-5", "1h 30m", "1e3", "ten", "5mm", "∞", "٣m"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SettingsError, match="--ttl .* is not a duration: give one such as"):
        parse_duration("--ttl", text)


def test_revisions_on_their_way() -> None:
    assert _revision({"live_revision": 3, "desired_revision": 3}) == "3"
    assert _revision({"live_revision": 3, "desired_revision": 5}) == "3 -> 5"


def test_a_change_is_told_to_people_and_to_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    change = {
        "revision": 4,
        "dry_run": False,
        "engines": None,
        "diff": {"mode": ["active", "off"]},
        "applied": [
            {"engine": "a", "state": "live", "revision": 4, "step": 17},
            {"engine": "b", "state": "sent", "revision": 3, "step": None},
        ],
        "reverts_at_s": None,
    }
    show_change(change, Format.TABLE)
    told = capsys.readouterr().out
    assert "revision 4" in told and "a: live since step 17" in told and "b: sent\n" in told
    show_change(change, Format.JSON)
    assert json.loads(capsys.readouterr().out) == change
    show_change({**change, "diff": {}, "applied": []}, Format.TABLE)
    assert "nothing to change" in capsys.readouterr().out


def test_what_people_wrote_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"reason [why]": "as in [/runbook] says", "engine": "[prefill]:warning:", "id": "[red]7"}
    show([row], Format.TABLE, title="imbalance [x]")
    title, header, line = capsys.readouterr().out.splitlines()
    assert title.rstrip() == "imbalance [x]" and header.startswith("reason [why]")
    assert line.split("  ") == ["as in [/runbook] says", "[prefill]:warning:", "[red]7"]
