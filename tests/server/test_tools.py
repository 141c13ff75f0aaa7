"""`llep record`, `tune`, `loads matrix|hot`, `plan list|show`, `settings history|diff|rollback` for scripts."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from conftest import LLEP, Llep
from recorded import deliver
from running import Running

from llep.shapes import ModelShape
from llep.traces import Trace, unpacked

OK, ERROR, USAGE, UNREACHABLE, CHECK_FAILED = 0, 1, 2, 3, 4
SHAPE = ModelShape(
    name="tiny", layer_numbers=(0, 1), num_experts=16, top_k=2, hidden_size=2880, intermediate_size=2880,
    bytes_per_expert=13_000_000,
)  # fmt: skip


def test_a_recording_from_its_start_to_its_settings(busy: Running, llep: Llep, tmp_path: Path) -> None:
    def ask(*arguments: str, expect: int = OK) -> str:
        done = llep(*arguments, "--server", busy.url)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == OK else done.stderr

    started = json.loads(ask("record", "start", "--steps", "12", "--reason", "try", "-o", "json"))
    id = started["id"]
    assert (started["state"], started["steps_wanted"]) == ("ordered", 12)
    assert "is being recorded: stop it with" in ask("record", "start", expect=ERROR)
    assert "it has no data to fetch" in ask("record", "export", id, expect=ERROR)
    deliver(
        busy.call, id, tmp_path / "rec", steps=12, shape=SHAPE, loads="zipf:ratio=3", num_ranks=4, tokens_per_rank=32768
    )
    (row,) = csv.DictReader(io.StringIO(ask("record", "list", "-o", "csv")))
    assert (row["id"], row["state"], row["steps"]) == (id, "done", "12")
    tar = tmp_path / "got.tar"
    assert "12 steps" in ask("record", "export", id, "-o", str(tar))
    again, size = tmp_path / "again.tar", tar.stat().st_size
    other = tmp_path / "again.tar.partial"
    for begun in (other, tmp_path / "again.tar.20260101-000000-abcdef-5000.partial"):
        begun.write_bytes(b"x" * 1000)  # of another recording, whose export to the same file broke off
    rest = tmp_path / f"again.tar.{id}-{size}.partial"
    rest.write_bytes(tar.read_bytes()[:1000])  # as if the first try had broken off
    ask("record", "export", id, "-o", str(again))
    assert again.read_bytes() == tar.read_bytes() and other.exists() and not rest.exists()
    with unpacked(tar) as folder:
        assert len(list(Trace(folder).steps())) == 12
    for recording in (id, str(tar)):
        found = json.loads(ask("tune", recording, "--set", "imbalance_threshold=50", "-o", "json"))
        assert found["verdict"] == "worth_it" and found["patch"]["imbalance_threshold"] < 3
    told = ask("tune", id, "--apply", "--set", "imbalance_threshold=50", "--engine", "tiny")
    assert "set it with: llep settings set" in told and "revision" in told
    (newest, *_) = json.loads(ask("settings", "history", "-o", "json"))
    assert newest["reason"].startswith(f"llep tune {id}: ") and newest["patch"] == found["patch"]
    assert "nothing is worth setting" in ask("tune", str(tar), "--apply", expect=CHECK_FAILED)
    assert json.loads(ask("record", "delete", id, "-o", "json"))["state"] == "deleted"
    assert ask("record", "list") == "nothing to show\n"
    assert "no recording" in ask("record", "stop", id, expect=ERROR)
    assert "does not exist" in ask("tune", "nowhere.tar", expect=USAGE)


def test_loads_by_layer_and_the_hottest_experts(busy: Running, llep: Llep, tmp_path: Path) -> None:
    def ask(*arguments: str, expect: int = OK) -> str:
        done = llep("loads", *arguments, "--server", busy.url, "--window", "15m")
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == OK else done.stderr

    matrix = json.loads(ask("matrix", "-o", "json"))
    rows = list(csv.DictReader(io.StringIO(ask("matrix", "-o", "csv"))))
    assert [int(row["layer"]) for row in rows] == matrix["layers"]
    assert [[int(row[f"rank_{rank}"]) for rank in range(len(values))] for row, values in zip(
        rows, matrix["values"], strict=True)] == matrix["values"]  # fmt: skip
    table = ask("matrix", "--by", "expert")
    assert "before balancing, by expert" in table and "█" in table
    for suffix in ("csv", "parquet", "json"):
        assert "wrote" in ask("matrix", "--stage", "after", "--file", str(tmp_path / f"m.{suffix}"))
        assert (tmp_path / f"m.{suffix}").stat().st_size > 50
    assert "must end in" in ask("matrix", "--file", "m.xlsx", expect=USAGE)
    hot = json.loads(ask("hot", "--limit", "3", "--engine", "tiny", "-o", "json"))
    assert len(hot) == 3 and hot[0]["share"] >= hot[1]["share"] >= hot[2]["share"] > 0
    assert "times fair" in ask("hot")


def test_sampled_plans(busy: Running, llep: Llep) -> None:
    plans = llep("plan", "list", "--server", busy.url)
    assert plans.returncode == OK
    header, newest, *_ = plans.stdout.splitlines()
    assert header.split()[0] == "id"
    shown = llep("plan", "show", newest.split()[0], "--server", busy.url)  # as it is printed
    assert shown.returncode == OK and "routed" in shown.stdout
    missing = llep("plan", "show", "99999", "--server", busy.url)
    assert missing.returncode == ERROR and "Traceback" not in missing.stderr


def test_settings_come_back(busy: Running, llep: Llep) -> None:
    def ask(*arguments: str, expect: int = OK) -> str:
        done = llep("settings", *arguments, "--server", busy.url)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == OK else done.stderr

    ask("set", "imbalance_threshold=1.7", "--reason", "first")
    ask("set", "imbalance_threshold=1.9")
    assert "imbalance_threshold" in ask("diff")
    assert json.loads(ask("diff", "2", "-o", "json")) == [{"key": "imbalance_threshold", "before": 1.7, "after": 1.9}]
    assert "would change" in ask("rollback", "1", "--dry-run")
    ask("rollback", "1", "--reason", "back")
    history = json.loads(ask("history", "-o", "json"))
    assert [one["reason"] for one in history] == ["back", "", "first"]
    (held,) = json.loads(ask("get", "imbalance_threshold", "-o", "json"))["settings"]
    assert held["value"] == 1.7
    assert "no revision 77" in ask("diff", "77", expect=USAGE)
    assert "no revision 77" in ask("rollback", "77", expect=ERROR)


@pytest.mark.parametrize("after_s", [0.4, 0.5, 0.6])  # q may come at any moment of the looks that go on beside
def test_top_draws_in_a_small_terminal_and_quits(busy: Running, after_s: float) -> None:
    master, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(follower)
    process = subprocess.Popen(
        [LLEP, "top", "--server", busy.url, "--interval", "0.3s"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )

    def drawn(*texts: bytes) -> bytes:
        """Returns when all of these have been drawn; without any, when the process has ended."""
        seen, deadline_s = b"", time.monotonic() + 60
        while not all(text in seen for text in texts) if texts else process.poll() is None:
            assert time.monotonic() < deadline_s, seen
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 65536)
        while select.select([master], [], [], 0)[0]:
            seen += os.read(master, 65536)
        return seen

    with process:
        try:
            drawn(b"imbalance", b"worst layer", b"hot in layer", b"q quits")
            os.write(master, b"p")
            drawn(b"prefill")
            time.sleep(after_s)
            os.write(master, b"q")
            assert b"Traceback" not in drawn()
        finally:
            process.kill()
    assert process.returncode == OK
    assert termios.tcgetattr(follower) == before  # the terminal is as it was


def test_top_once_and_without_a_terminal(busy: Running, llep: Llep) -> None:
    once = llep("top", "--once", "--server", busy.url)
    assert once.returncode == OK and len(once.stdout.splitlines()) <= 25
    assert all(len(line) <= 80 for line in once.stdout.splitlines())
    assert "tiny" in once.stdout and "imbalance" in once.stdout
    refused = llep("top", "--server", busy.url)
    assert refused.returncode == USAGE and "needs a terminal" in refused.stderr
    assert llep("top", "--once", "--server", "http://127.0.0.1:1").returncode == UNREACHABLE
