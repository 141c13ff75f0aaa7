"""README and docs are true: every command parses against the real command line, cheap ones run, names exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from llep.cli import _register, app
from llep.cli.doctor import TRIED_MODELS
from llep.cli.preflight import CONFLICTS
from llep.config import NOT_SETTINGS, Settings, parse_assignments
from llep.vllm_plugin import TESTED_VLLM
from tests import supported
from tests.documented import ALONE, BY_OTHERS, LIVE, NOT_RUN, PAGES, ROOT, begins, blocks, typed
from tests.unit.commands import run_llep

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")  # ID, FILE, DIR, N, MODEL, FLAGS
TAKES_ANYTHING = ("serve", "with-ray", "bench", "doctor")  # what follows belongs to another program


def inline(text: str) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))


def commands(path: Path) -> Iterator[tuple[str, bool]]:
    """(`llep ...` command, whether it is one to type: in prose a command may be named without what it needs).

    Without variables before them; shorthands such as a|b or ... are left out.
    """
    text = path.read_text()
    for line, is_typed in (*((line, True) for line in blocks(text)), *((line, False) for line in inline(text))):
        command = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
        command = re.split(r" (?:\||>|&&) ", command)[0]
        if command.startswith("llep ") and "..." not in command and "|" not in command and "{" not in command:
            yield command, is_typed


def all_commands() -> list[tuple[str, str, bool]]:
    return sorted({(path.name, *command) for path in PAGES for command in commands(path)})


def resolve(words: list[str]) -> tuple[click.Command, list[str], list[str]]:
    """The command that the words name, the words of its name, and what follows."""
    _register()
    group: click.Command = typer.main.get_command(app)
    name: list[str] = []
    while hasattr(group, "commands") and words and not words[0].startswith("-"):
        assert words[0] in group.commands, f"`llep {' '.join([*name, words[0]])}` does not exist"
        group = group.commands[words[0]]
        name.append(words.pop(0))
    return group, name, words


@pytest.mark.parametrize(("page", "command", "is_typed"), all_commands())
def test_commands_parse(page: str, command: str, is_typed: bool) -> None:
    found, name, words = resolve(shlex.split(command)[1:])
    if not name or "--help" in words or name[0] in TAKES_ANYTHING or (not words and not is_typed):
        return
    words = ["1" if PLACEHOLDER.fullmatch(word) else word for word in words]
    try:
        found.make_context(" ".join(name), list(words))
    except Exception as error:
        message = str(getattr(error, "message", error))
        missing = "Missing argument" in message or type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
        if is_typed or not missing:
            raise AssertionError(f"{page}: `{command}`: {message}") from None
    if name == ["settings", "set"] and "KEY=VALUE" not in words:
        Settings().changed(parse_assignments([word for word in words if "=" in word and not word.startswith("-")]))


TYPED = [(path.name, command) for path in PAGES for command in typed(path)]


@pytest.mark.parametrize(("page", "command"), sorted(set(TYPED)))
def test_every_command_is_run_by_some_test_or_listed_as_not_run(page: str, command: str) -> None:
    classes = [begins(command, each) for each in (ALONE, LIVE, BY_OTHERS, NOT_RUN)]
    assert sum(classes) == 1, f"{page}: `{command}` is in {sum(classes)} of the lists of tests/documented.py"


def test_what_is_not_run_is_said() -> None:
    text = (ROOT / "docs" / "support.md").read_text()
    assert dict(re.findall(r"^\| `([^`]+)` ... \| (.*) \|$", text, re.MULTILINE)) == NOT_RUN
    for program, test in BY_OTHERS.items():
        word = next(word for word in [*program.split()[1:], program] if word != "-m")
        assert word in (ROOT / test).read_text(), f"{test} does not run {program}"


def test_what_stands_alone_runs(tmp_path: Path) -> None:
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    (tmp_path / "recording").symlink_to(ROOT / "bench" / "natural" / "traces" / "python-decode")
    question = {"tokens": [[4000, 96, 10, 10], [4000, 96, 10, 10]], "min_chunk_tokens": 64}
    (tmp_path / "question.json").write_text(json.dumps(question))
    commands = {command.replace("--time-limit 60", "--time-limit 5") for _, command in TYPED if begins(command, ALONE)}
    assert len(commands) > 5
    for command in sorted(commands):
        words = [str(tmp_path / "out") if PLACEHOLDER.fullmatch(word) else word for word in shlex.split(command)[1:]]
        done = run_llep(*words, cwd=tmp_path)
        assert done.returncode == 0, f"`{command}`: {done.stderr}"


def test_there_are_commands_to_check() -> None:
    assert len(all_commands()) > 40
    names = {tuple(command.split()[1:2]) for _, command, _ in all_commands()}
    assert {("record",), ("tune",), ("report",), ("bench",), ("top",), ("doctor",)} <= names


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_modules_make_targets_variables_and_links_exist(path: Path) -> None:
    text = path.read_text()
    for module in re.findall(r"python -m (bench[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{module} does not exist"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)", text) + re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} does not exist"
    settings = {f"LLEP_{key.upper()}" for key in Settings.model_fields} | {f"LLEP_{key}" for key in NOT_SETTINGS}
    settings |= set(re.findall(r"LLEP_[A-Z_]+[A-Z]\b", (ROOT / "deploy" / "compose.yaml").read_text()))
    for variable in re.findall(r"\bLLEP_[A-Z_]+[A-Z]\b", text):
        assert variable in settings or variable.startswith("LLEP_SERVER_"), f"{variable} does not exist"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith(("http://", "https://")):
            assert (path.parent / link).exists(), f"{link} does not exist"


def test_the_support_table_is_what_the_code_refuses_and_tries() -> None:
    text = (ROOT / "docs" / "support.md").read_text()
    listed = dict(re.findall(r"^\| `(--[^`]+)` \| (.*) \|$", text, re.MULTILINE))
    assert listed == CONFLICTS
    for family in TRIED_MODELS:
        assert f"`{family}`" in text
    assert all(version.rstrip(".") in text for version in TESTED_VLLM)
    kinds = (ROOT / "tests" / "vllm").glob("test_*.py")
    assert any("gpt-oss" in kind.read_text() or "GPT_OSS" in kind.read_text() for kind in kinds)


def test_the_support_table_is_made_from_tests() -> None:
    assert not supported.missing(), "tests/supported.py names tests that are not there"
    assert supported.in_page() == supported.table(), "write it anew: python -m tests.supported"


def test_the_picture_of_the_thresholds_is_there() -> None:
    text = (ROOT / "docs" / "thresholds.svg").read_text()
    assert all(key in text for key in ("imbalance_threshold", "capacity_factor", "min_chunk_tokens", "slots_per_rank"))
    assert os.path.getsize(ROOT / "docs" / "thresholds.svg") < 50_000
