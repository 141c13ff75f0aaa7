"""Each command brings the modules that it is made of, and no more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from typer.main import get_command

from llep.cli import COMMANDS, MODULES, _asked_for, app, modules_of

PROGRAM = "import sys; from tests.unit.test_cli_modules import check_modules; check_modules()"


def paths(group: object, *above: str) -> Iterator[tuple[str, ...]]:
    """Of every command below the group."""
    for name, command in getattr(group, "commands", {}).items():
        yield (*above, name)
        yield from paths(command, *above, name)


def check_modules() -> None:
    """In a fresh interpreter: what each module adds belongs to commands that bring the module."""
    import importlib

    seen: set[tuple[str, ...]] = set()
    for module in COMMANDS:
        importlib.import_module(f"llep.cli.{module}").add_to(app)
        found = set(paths(get_command(app)))
        for path in found - seen:
            assert module in modules_of(path[0]), (module, path)
        seen = found
    assert {path[0] for path in seen} == {word for word in MODULES if modules_of(word) != COMMANDS}


def test_a_command_brings_what_it_is_made_of() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


def test_what_is_no_command_brings_all() -> None:
    for word in ("", "--help", "statsu", "control", "history", "with_ray"):
        assert modules_of(word) == COMMANDS


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (None, "mode"),
        ("llep\nloads\n", "loads"),
        ("llep\nload", ""),
        ("llep\n", ""),
        ("llep settings get im", "settings"),
    ],
)
def test_what_the_shell_completes(monkeypatch: pytest.MonkeyPatch, line: str | None, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["llep", "mode", "off"])
    monkeypatch.delenv("_TYPER_COMPLETE_ARGS", raising=False)
    monkeypatch.delenv("COMP_WORDS", raising=False)
    if line is not None:
        monkeypatch.setenv("COMP_WORDS", line)
    assert _asked_for() == command
