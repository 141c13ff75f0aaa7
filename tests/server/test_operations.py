"""Long jobs over HTTP: tuned to the end, cancelled, bounded, and still known after the control plane was killed."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from recorded import deliver, order, recorded
from reporting import Engine
from running import Running, start
from test_http import error_of

from bench.server import Caller, child
from llep.messages import encode
from llep_server import operations
from llep_server.config import ServerConfig
from llep_server.recordings import COPY_PREFIX


def tune(http: httpx.Client, recording: str, **order: Any) -> str:
    """The id of the operation."""
    started = http.post("/v1/tuning", json={"recording": recording, **order})
    assert started.status_code == 202, started.text
    return str(started.json()["id"])


def once(http: httpx.Client, id: str, *states: str, timeout_s: float = 120) -> dict[str, Any]:
    """The operation once it is in one of these states."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        operation: dict[str, Any] = http.get(f"/v1/operations/{id}").json()
        if operation["state"] in states:
            return operation
        assert time.monotonic() < deadline_s, operation
        time.sleep(0.1)


def test_tuning_ranks_settings_and_names_the_patch(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made")
    started = running.http.post("/v1/tuning", json={"recording": id, "base": {"min_chunk_tokens": 65536}})
    assert started.status_code == 202
    operation = once(running.http, started.headers["Location"].rpartition("/")[2], "done")
    assert operation["progress_ratio"] == 1.0 and operation["author"] == "anonymous@127.0.0.1"
    result = operation["result"]
    seconds = [case["seconds_per_step"] for case in result["cases"]]
    assert seconds == sorted(seconds)
    if result["patch"]:  # what it proposes is taken
        assert running.http.patch("/v1/settings", json=result["patch"]).status_code == 200
    (listed,) = running.http.get("/v1/operations").json()["data"]
    assert listed["id"] == operation["id"] and listed["result"] is None
    assert running.http.delete(f"/v1/operations/{operation['id']}").status_code == 200
    error_of(running.http.get(f"/v1/operations/{operation['id']}"), 404, "unknown_operation")


def test_an_operation_is_cancelled_and_the_next_one_runs(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    id = recorded(running, tmp_path / "made", steps=400)
    first, second = (tune(running.http, id) for _ in range(2))
    assert once(running.http, first, "running")["started_s"] is not None
    assert running.http.get(f"/v1/operations/{second}").json()["state"] == "waiting"
    assert running.http.delete(f"/v1/operations/{first}").json()["state"] == "cancelled"
    once(running.http, second, "done")
    assert list(tmp_path.glob(f"{COPY_PREFIX}*")) == []


def test_operations_are_bounded(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = recorded(running, tmp_path / "made", steps=400)
    monkeypatch.setattr(operations, "MOST_WAITING", 1)
    monkeypatch.setattr(operations, "MOST_KEPT", 2)
    answers = [running.http.post("/v1/tuning", json={"recording": id}) for _ in range(3)]
    assert [answer.status_code for answer in answers[:2]] == [202, 202]
    error_of(answers[2], 503, "busy")
    for answer in answers[:2]:
        running.http.delete(f"/v1/operations/{answer.json()['id']}")
    third = running.http.post("/v1/tuning", json={"recording": id}).json()["id"]
    kept = [operation["id"] for operation in running.http.get("/v1/operations").json()["data"]]
    assert len(kept) == 2 and kept[0] == third
    running.http.delete(f"/v1/operations/{third}")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"base": {"mode": "on"}}, "invalid_setting"),
        ({"base": {"cost_model": "/etc/passwd"}}, "invalid_setting"),
        ({"cost_model": "/etc/passwd"}, "invalid_setting"),
        ({"ranks": 0}, "invalid_request"),
        ({"colour": 1}, "invalid_request"),
    ],
)
def test_bad_tuning(unchanged: Running, body: dict[str, Any], code: str) -> None:
    error_of(unchanged.http.post("/v1/tuning", json={"recording": "x", **body}), 422, code)


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    """A scheduler in a process of its own, with a recording; the recording's id."""
    with child("--scheduler", f"{folder}/scheduler", "--state", f"{folder}/state"):

        def call(method: str, **arguments: Any) -> Any:
            async def ask() -> Any:
                caller = Caller(f"{folder}/scheduler")
                try:
                    return await caller.call(method, **arguments)
                finally:
                    await caller.close()

            return asyncio.run(ask())

        call("report", reports=[encode(report) for report in Engine().reports()], known_revision=0)
        with control_plane(folder) as (_, http):
            id = order(http)
        deliver(call, id, folder / "made", steps=400)
        yield id


@contextmanager
def control_plane(folder: Path) -> Iterator[tuple[Any, httpx.Client]]:
    with child("--serve", f"{folder}/scheduler") as (process, port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as http:
            yield process, http


def test_operations_outlive_a_control_plane_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scheduler(tmp_path) as recording:
        with control_plane(tmp_path) as (process, http):
            done = once(http, tune(http, recording, base={"min_chunk_tokens": 65536}), "done")
            running, waiting = (tune(http, recording) for _ in range(2))
            once(http, running, "running")
            while not list(tmp_path.glob(f"{COPY_PREFIX}*")):
                time.sleep(0.01)
            process.kill()
            process.wait()
            assert list(tmp_path.glob(f"{COPY_PREFIX}*"))
        with control_plane(tmp_path) as (_, http):
            listed = {one["id"]: one["state"] for one in http.get("/v1/operations").json()["data"]}
            assert listed == {waiting: "failed", running: "failed", done["id"]: "done"}
            assert http.get(f"/v1/operations/{done['id']}").json() == done
            for id in (running, waiting):
                operation = http.get(f"/v1/operations/{id}").json()
                assert operation["error"]["code"] == "interrupted" and operation["ended_s"]
                assert "start it again" in operation["error"]["message"]
            assert list(tmp_path.glob(f"{COPY_PREFIX}*")) == []
            again = once(http, tune(http, recording, **{"base": {"min_chunk_tokens": 65536}}), "done")
            assert again["result"] == done["result"]
            http.delete(f"/v1/operations/{waiting}")
        with control_plane(tmp_path) as (_, http):
            assert [one["id"] for one in http.get("/v1/operations").json()["data"]] == [
                again["id"],
                running,
                done["id"],
            ]


def test_one_that_runs_when_the_control_plane_is_stopped_says_so_afterwards(tmp_path: Path) -> None:
    with contextmanager(start)(ServerConfig(), tmp_path / "state") as before:
        id = tune(before.http, recorded(before, tmp_path / "made", steps=400))
    with contextmanager(start)(ServerConfig(), tmp_path / "state") as after:
        operation = after.http.get(f"/v1/operations/{id}").json()
        assert (operation["state"], operation["error"]["code"]) == ("failed", "interrupted")


def test_two_control_planes_on_one_folder(running: Running, tmp_path: Path) -> None:
    """The second leaves alone what the first one keeps there."""
    id = recorded(running, tmp_path / "made", steps=8)
    first = tune(running.http, id)
    second = operations.Operations(running.app.state.scheduler, tmp_path / "state")
    second.open()
    assert second.all() == []
    assert once(running.http, first, "done")["error"] is None


def test_what_is_not_an_operation_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "operations"
    folder.mkdir(parents=True)
    (folder / "old.json").write_text('{"id": "old"}')
    (folder / "half.tmp").write_text('{"id": "ha')
    with contextmanager(start)(ServerConfig(), tmp_path / "state") as running:
        assert running.http.get("/v1/operations").json()["data"] == []
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "old.json"]


def test_an_operation_that_cant_be_kept_is_refused(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made", steps=8)
    folder = tmp_path / "state" / "operations"
    folder.rename(tmp_path / "away")  # as a disk that fails
    error_of(running.http.post("/v1/tuning", json={"recording": id}), 503, "store_unavailable")
    assert running.http.get("/v1/operations").json()["data"] == []
    (tmp_path / "away").rename(folder)
    once(running.http, tune(running.http, id), "done")
