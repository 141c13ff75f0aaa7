"""Tab in a real bash whose completion `llep --install-completion` has set up."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LLEP
from recorded import recorded
from running import Running

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

PROMPT = "ready> "
WITHIN_S = 120


class Bash:
    """An interactive bash on a terminal of its own, with a home of its own."""

    def __init__(self, home: Path, server: str) -> None:
        self._terminal, other = pty.openpty()
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("LLEP_", "BASH"))}
        environ |= {"HOME": str(home), "LLEP_SERVER": server, "TERM": "dumb", "COLUMNS": "200", "PS1": PROMPT}
        environ["PATH"] = f"{LLEP.parent}{os.pathsep}{environ['PATH']}"
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "-i"], stdin=other, stdout=other, stderr=other, env=environ, start_new_session=True
        )
        os.close(other)
        self.run("PS1='ready> '; bind 'set bell-style none'; bind 'set completion-query-items 0'")

    def run(self, command: str) -> str:
        """What it printed, once the prompt is back."""
        os.write(self._terminal, f"{command}; echo end-of-it\n".encode())
        return self._read(r"\nend-of-it\r?\n.*ready> $")

    def tab(self, line: str, expected: str) -> str:
        """What stands on the screen when Tab has been pressed twice after the line and `expected` is there."""
        os.write(self._terminal, f"{line}\t\t".encode())
        shown = self._read(expected)
        os.write(self._terminal, b"\x15\n")  # Ctrl-U takes the line away
        self._read(r"ready> $")
        return shown

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def _read(self, until: str) -> str:
        text, deadline_s = "", time.monotonic() + WITHIN_S
        while not re.search(until, text, re.DOTALL):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0 and select.select([self._terminal], [], [], left_s)[0], f"no {until!r} in {text!r}"
            text += os.read(self._terminal, 1 << 16).decode(errors="replace")
        return text


@pytest.fixture(scope="module")
def installed(unchanged: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bash, str]]:
    """A bash started after the installation, and the id of a recording of the engine `tiny`."""
    home = tmp_path_factory.mktemp("home")
    recording = recorded(unchanged, home / "made", steps=8)
    before = Bash(home, unchanged.url)
    try:
        assert "bash completion installed in" in before.run("llep --install-completion")
    finally:
        before.close()
    bash = Bash(home, unchanged.url)
    yield bash, recording
    bash.close()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llep stat", r"llep status "),
        ("llep loads ", r"hot\b.*matrix\b.*ranks\b"),
        ("llep tune --cost", r"--cost-model "),
        ("llep mode sh", r"llep mode shadow "),
        ("llep loads ranks -o y", r"-o yaml "),
        ("llep loads ranks --engine ", r"--engine tiny "),
        ("llep settings get imbal", r"imbalance_threshold "),
        ("llep settings set capac", r"capacity_factor="),
        ("llep record export ", r"record export RECORDING "),
        ("llep tune ", r"tune RECORDING "),
    ],
)
def test_tab(installed: tuple[Bash, str], line: str, expected: str) -> None:
    bash, recording = installed
    bash.tab(line, expected.replace("RECORDING", re.escape(recording)))


def test_nothing_is_said_where_no_control_plane_answers(installed: tuple[Bash, str]) -> None:
    bash, _ = installed
    shown = bash.run(
        "COMP_WORDS='llep loads ranks --engine ' COMP_CWORD=4 _LLEP_COMPLETE=complete_bash "
        "LLEP_SERVER=http://127.0.0.1:1 llep"
    )
    assert "llep:" not in shown and "Traceback" not in shown and "tiny" not in shown
