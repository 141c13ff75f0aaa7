"""The command line against a running control plane: what scripts read, and the exit codes they go by."""

from __future__ import annotations

import csv
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LLEP, Llep
from reporting import Engine
from running import Running, start

from llep_server.config import ServerConfig

OK, ERROR, USAGE, UNREACHABLE, CHECK_FAILED = 0, 1, 2, 3, 4


def test_status(busy: Running, llep: Llep) -> None:
    ended = llep("status", "-o", "json", LLEP_SERVER=busy.url)
    assert (ended.returncode, ended.stderr) == (OK, "")
    status = json.loads(ended.stdout)
    assert status["status"] == "ok" and all(check["ok"] for check in status["checks"])
    assert [engine["id"] for engine in status["engines"]] == ["tiny"]
    assert status["loads"][0]["tokens"] == 3 * 256
    table = llep("status", "--server", busy.url)
    assert table.returncode == OK
    assert "tiny" in table.stdout and "scheduler" in table.stdout


def test_loads_ranks_in_every_format(busy: Running, llep: Llep) -> None:
    outputs = {
        format: llep("loads", "ranks", "--window", "15m", "--engine", "tiny", "-o", format, LLEP_SERVER=busy.url)
        for format in ("table", "json", "yaml", "csv")
    }
    assert {ended.returncode for ended in outputs.values()} == {OK}
    (loads,) = json.loads(outputs["json"].stdout)
    assert yaml.safe_load(outputs["yaml"].stdout)[0]["ranks"] == loads["ranks"]
    rows = list(csv.DictReader(io.StringIO(outputs["csv"].stdout)))
    assert [int(row["computed_tokens"]) for row in rows] == [rank["computed_tokens"] for rank in loads["ranks"]]
    assert sum(int(row["routed_tokens"]) for row in rows) == 3 * 256 * 4 * 3
    assert "computed_tokens" in outputs["table"].stdout


def test_a_placement_is_suggested_applied_and_taken_back(busy: Running, llep: Llep, tmp_path: Path) -> None:
    def ask(*command: str) -> dict[str, Any]:
        ended = llep(*command, "-o", "json", LLEP_SERVER=busy.url)
        assert ended.returncode == OK, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        return found

    assert ask("placement", "suggest", "--engine", "tiny")["added"] == []
    refused = llep("placement", "apply", LLEP_SERVER=busy.url)
    assert refused.returncode == ERROR and "off: replicas is off" in refused.stderr
    ask("settings", "set", "replicas=suggest")
    copies = tmp_path / "copies.json"
    copies.write_text(json.dumps([{"layer": 5, "expert": 0, "rank": 1}]))
    trial = ask("placement", "apply", "--file", str(copies), "--dry-run")
    assert (trial["number"], trial["used_slots"]) == (0, [0, 1])
    assert ask("placement", "apply", "--file", str(copies), "--reason", "to try")["number"] == 2
    table = llep("placement", "show", LLEP_SERVER=busy.url)
    assert table.returncode == OK and "tiny" in table.stdout and "suggest" in table.stdout
    assert ask("placement", "rollback")["replicas"] == []
    copies.write_text("[{")
    assert llep("placement", "apply", "--file", str(copies), LLEP_SERVER=busy.url).returncode == USAGE


def test_advice(busy: Running, llep: Llep) -> None:
    table = llep("advice", LLEP_SERVER=busy.url)
    assert table.returncode == OK and "tiny: not enough evidence" in table.stdout
    (advice,) = json.loads(llep("advice", "-o", "json", LLEP_SERVER=busy.url).stdout)
    assert advice["verdict"] == "not_enough_evidence" and advice["numbers"]["layer_steps"] > 0


def test_settings_get_and_set(busy: Running, llep: Llep) -> None:
    dry = llep("settings", "set", "imbalance_threshold=2", "--dry-run", "-o", "json", LLEP_SERVER=busy.url)
    assert json.loads(dry.stdout)["dry_run"] is True
    flags = ("--reason", "trying", "--if-revision", "0", "--engine", "tiny", "-o", "json")
    done = llep("settings", "set", "imbalance_threshold=2", "layers=0,3-7", *flags, LLEP_SERVER=busy.url)
    change = json.loads(done.stdout)
    assert change["revision"] == 1 and change["engines"] == ["tiny"]
    assert change["diff"] == {"imbalance_threshold": [1.3, 2.0], "layers": ["all", "0,3-7"]}
    got = llep("settings", "get", "layers", "--engine", "tiny", "-o", "json", LLEP_SERVER=busy.url)
    (setting,) = json.loads(got.stdout)["settings"]
    assert (setting["key"], setting["value"], setting["hot"]) == ("layers", "0,3-7", True)
    late = llep("settings", "set", "watchdog_s=30", "--if-revision", "0", LLEP_SERVER=busy.url)
    assert late.returncode == ERROR and "revision 1" in late.stderr
    back = llep("settings", "set", "layers=null", "--engine", "tiny", "-o", "json", LLEP_SERVER=busy.url)
    assert json.loads(back.stdout)["diff"] == {"layers": ["0,3-7", "all"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["settings", "set", "imbalance_treshold=2"], "did you mean 'imbalance_threshold'?"),
        (["settings", "set", "imbalance_threshold=0"], "imbalance_threshold=0 is not valid"),
        (["settings", "set", "slots_per_rank=2"], "can't change while serving"),
        (["settings", "set", "mode"], "'mode' is not of the form key=value"),
        (["settings", "get", "mod"], "did you mean 'mode'?"),
        (["mode", "active", "--ttl", "soon"], "--ttl 'soon' is not a duration"),
        (["loads", "ranks", "--window", "x"], "--window 'x' is not a duration"),
        (["loads", "ranks", "--window", "0"], "window_s"),
    ],
)
def test_usage_errors(unchanged: Running, llep: Llep, arguments: list[str], words: str) -> None:
    ended = llep(*arguments, LLEP_SERVER=unchanged.url)
    assert (ended.returncode, ended.stdout) == (USAGE, "")
    assert words in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_of_several_engines_one_is_to_be_named(running: Running, llep: Llep) -> None:
    for name in ("one", "other"):
        running.report(Engine(name=name))
    ended = llep("loads", "matrix", LLEP_SERVER=running.url)
    assert ended.returncode == USAGE
    assert "there are one, other; name one with --engine" in ended.stderr


def test_unknown_engine(unchanged: Running, llep: Llep) -> None:
    ended = llep("settings", "set", "mode=off", "--engine", "nobody", LLEP_SERVER=unchanged.url)
    assert ended.returncode == ERROR and "nobody" in ended.stderr


def test_mode(busy: Running, llep: Llep) -> None:
    ended = llep("mode", "observe", "--ttl", "1h30m", "-o", "json", LLEP_SERVER=busy.url)
    change = json.loads(ended.stdout)
    assert change["diff"] == {"mode": ["active", "observe"]}
    assert change["reverts_at_s"] is not None
    assert llep("mode", "of", LLEP_SERVER=busy.url).returncode == USAGE


def test_unreachable(unchanged: Running, llep: Llep) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for arguments in (["status"], ["loads", "ranks"], ["settings", "get"], ["mode", "off"]):
        ended = llep(*arguments, LLEP_SERVER=f"http://127.0.0.1:{port}")
        assert (ended.returncode, ended.stdout) == (UNREACHABLE, "")
        assert "start it with 'llep control-plane'" in ended.stderr and len(ended.stderr.splitlines()) == 1
    unchanged.caller.is_up = False
    try:
        ended = llep("status", LLEP_SERVER=unchanged.url)
    finally:
        unchanged.caller.is_up = True
    assert ended.returncode == UNREACHABLE and "no scheduler" in ended.stderr


@pytest.mark.parametrize("server", ["127.0.0.1:8088", "ftp://host", "http://", "http://[::1"])
def test_bad_address(llep: Llep, server: str) -> None:
    ended = llep("status", "--server", server)
    assert ended.returncode == USAGE and "--server" in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Running]:
    keys = tmp_path / "keys"
    keys.write_text("bob read reading-key-0123456789\n")
    yield from start(ServerConfig(keys_file=keys), tmp_path / "state")


def test_keys(guarded: Running, llep: Llep, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("reading-key-0123456789\n")
    assert llep("settings", "get", "--key-file", str(mine), LLEP_SERVER=guarded.url).returncode == OK
    assert llep("settings", "get", LLEP_KEY_FILE=str(mine), LLEP_SERVER=guarded.url).returncode == OK
    without = llep("settings", "get", LLEP_SERVER=guarded.url)
    assert without.returncode == ERROR and "--key-file" in without.stderr
    refused = llep("mode", "off", "--key-file", str(mine), LLEP_SERVER=guarded.url)
    assert refused.returncode == ERROR and "scope admin" in refused.stderr
    mine.write_text("two words\n")
    assert llep("settings", "get", "--key-file", str(mine), LLEP_SERVER=guarded.url).returncode == USAGE
    assert llep("settings", "get", "--key-file", str(tmp_path / "no"), LLEP_SERVER=guarded.url).returncode == USAGE


def test_something_else_at_the_address(llep: Llep) -> None:
    import http.server

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            ended = llep("status", LLEP_SERVER=f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()
    assert ended.returncode == ERROR and "not as llep's control plane does" in ended.stderr


def test_doctor_sees_the_control_plane(busy: Running, llep: Llep) -> None:
    findings = json.loads(llep("doctor", "-o", "json", LLEP_SERVER=busy.url).stdout)
    (found,) = [finding for finding in findings if finding["check"] == "control plane"]
    assert found["state"] == "ok" and busy.url in found["found"]


def test_doctor_fails_where_something_named_is_missing(llep: Llep, tmp_path: Path) -> None:
    variables = {
        "LLEP_SERVER": "http://127.0.0.1:1",
        "LLEP_RAY_ADDRESS": "127.0.0.1:1",
        "LLEP_MOD": "off",
        "LLEP_STATE_DIR": str(LLEP / "state"),
        "LLEP_SERVER_KEYS_FILE": str(tmp_path / "keys"),
    }
    ended = llep("doctor", "-o", "json", **variables)
    failed = {finding["check"]: finding for finding in json.loads(ended.stdout) if finding["state"] == "fail"}
    assert ended.returncode == CHECK_FAILED
    assert failed.keys() >= {"settings", "state folder", "keys file", "Ray", "control plane"}
    assert all(finding["advice"] for finding in failed.values())
    assert "did you mean 'mode'" in failed["settings"]["found"]
