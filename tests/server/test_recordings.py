"""Recordings as resources, and what is made of them: replayed, tuned for, as operations that can be cancelled."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from recorded import SHAPE, recorded
from reporting import Engine
from running import Running
from test_http import error_of

from llep.traces import Trace
from llep_server import recordings, simulation
from llep_server.recordings import COPY_PREFIX, Part, copy_of, parse_range, sweep_copies, unpack


def test_a_recording_from_order_to_deletion(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made")
    (listed,) = running.http.get("/v1/recordings").json()["data"]
    one = running.http.get(f"/v1/recordings/{id}").json()
    assert listed == one and (one["state"], one["author"], one["reason"]) == ("done", "anonymous@127.0.0.1", "to see")
    data = running.http.get(f"/v1/recordings/{id}/data")
    assert (data.status_code, data.headers["content-type"]) == (200, "application/x-tar")
    assert len(data.content) == one["data_bytes"] == int(data.headers["content-length"])
    assert id in data.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(data.content)) as tar:
        tar.extractall(tmp_path / "fetched", filter="data")
    (part,) = (tmp_path / "fetched").rglob("*.parquet")
    assert Trace(part).num_steps() == 40
    assert running.http.delete(f"/v1/recordings/{id}").json()["state"] == "deleted"
    error_of(running.http.get(f"/v1/recordings/{id}"), 404, "unknown_recording")
    assert running.http.get("/v1/recordings").json()["data"] == []


def test_a_download_goes_on_where_it_broke_off(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "CHUNK_BYTES", 1000)
    path = f"/v1/recordings/{recorded(running, tmp_path / 'made')}/data"
    whole = running.http.get(path)
    first = running.http.get(path, headers={"Range": "bytes=0-1499"})
    rest = running.http.get(path, headers={"Range": "bytes=1500-", "If-Range": whole.headers["ETag"]})
    assert (first.status_code, rest.status_code) == (206, 206)
    assert first.content + rest.content == whole.content
    size = len(whole.content)
    assert rest.headers["content-range"] == f"bytes 1500-{size - 1}/{size}"
    assert running.http.get(path, headers={"Range": "bytes=-10"}).content == whole.content[-10:]
    changed = running.http.get(path, headers={"Range": "bytes=5-9", "If-Range": '"other"'})
    assert changed.status_code == 200 and changed.content == whole.content
    beyond = running.http.get(path, headers={"Range": f"bytes={size}-"})
    error_of(beyond, 416, "invalid_range")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", Part(0, 1)),
        ("bytes=5-", Part(5, 100)),
        ("bytes=5-1000", Part(5, 100)),
        ("bytes=-200", Part(0, 100)),
        ("bytes=-", None),
        ("bytes=1-2,5-6", None),
        ("lines=1-2", None),
        ("bytes=a-b", None),
    ],
)
def test_ranges(header: str, part: Part | None) -> None:
    assert parse_range(header, 100) == part


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=7-3", "bytes=-0"])
def test_ranges_that_are_not_there(header: str) -> None:
    with pytest.raises(recordings.InvalidRange):
        parse_range(header, 100)


def test_too_many_downloads_are_told_so(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/v1/recordings/{recorded(running, tmp_path / 'made')}/data"
    monkeypatch.setattr(recordings, "MAX_DOWNLOADS", 0)
    error_of(running.http.get(path), 503, "busy")


def test_no_more_downloads_than_that_come_together(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/v1/recordings/{recorded(running, tmp_path / 'made')}/data"
    monkeypatch.setattr(recordings, "MAX_DOWNLOADS", 2)
    together, find = asyncio.Barrier(8), running.caller.scheduler.recording
    statuses: list[int] = []

    async def find_together(**arguments: Any) -> Any:
        await together.wait()
        return await find(**arguments)

    def fetch() -> None:
        with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http:
            statuses.append(http.get(path).status_code)

    monkeypatch.setattr(running.caller.scheduler, "recording", find_together)
    fetching = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in fetching:
        thread.start()
    for thread in fetching:
        thread.join()
    assert sorted(statuses) == 2 * [200] + 6 * [503]
    monkeypatch.undo()
    deadline_s = time.monotonic() + 10
    while running.app.state.downloads._open:
        assert time.monotonic() < deadline_s, "downloads that are over are still counted"
        time.sleep(0.05)
    assert running.http.get(path).status_code == 200


def test_before_the_end_there_is_nothing_to_fetch(running: Running) -> None:
    running.report(Engine())
    id = running.http.post("/v1/recordings", json={"steps": 5}).json()["id"]
    error_of(running.http.get(f"/v1/recordings/{id}/data"), 409, "recording_conflict")
    error_of(running.http.post("/v1/tuning", json={"recording": id}), 409, "recording_conflict")
    error_of(running.http.post("/v1/recordings", json={"steps": 5}), 409, "recording_conflict")
    assert running.http.post(f"/v1/recordings/{id}/stop").status_code == 200
    kinds = [event["kind"] for event in running.http.get("/v1/events").json()["data"]]
    assert "recording" in kinds


def test_in_mode_off_there_is_nothing_to_record(running: Running) -> None:
    running.report(Engine())
    running.http.put("/v1/mode", json={"mode": "off"}).raise_for_status()
    refused = error_of(running.http.post("/v1/recordings", json={"steps": 5}), 409, "recording_conflict")
    assert "mode off" in refused["message"] and "llep mode observe" in refused["message"]


def test_names_that_lead_elsewhere(unchanged: Running) -> None:
    for id in ("..", "%2e%2e", "..%2f..%2fetc", "a%00b", "x" * 150):
        answer = unchanged.http.get(f"/v1/recordings/{id}/data")
        assert answer.status_code in (404, 422), (id, answer.text)
    error_of(unchanged.http.post("/v1/tuning", json={"recording": "../../etc"}), 404, "unknown_recording")


def test_an_archive_that_leads_elsewhere_stays_in_its_folder(tmp_path: Path) -> None:
    archive, folder = tmp_path / "bad.tar", tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("../../part-000000.parquet", "/abs/part-000001.parquet", "notes.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("part-000002.parquet")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    unpack(archive, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]


def test_replay_of_a_recording(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made")
    body = {"recording": id, "settings": {"min_chunk_tokens": 64}, "max_steps": 10}
    answer = running.http.post("/v1/plans/simulate", json=body, timeout=90).json()
    assert answer["source"] == "recording" and answer["detail"]["steps"] == 10
    assert answer["after"]["imbalance_ratio"] < answer["before"]["imbalance_ratio"]
    assert answer["lends"] > 0 and answer["lend_bytes"] == answer["lends"] * SHAPE.bytes_per_expert
    assert answer["predicted_gain_s"] is None
    timed = running.http.post("/v1/plans/simulate", json={**body, "cost_model": "h100"}, timeout=90).json()
    assert timed["predicted_gain_s"] >= 0
    idle = {**body, "settings": {"min_batch_tokens": 1_000_000}}
    assert running.http.post("/v1/plans/simulate", json=idle, timeout=90).json()["lends"] == 0
    for wrong, param in (({"settings": {"mode": "on"}}, "mode"), ({"tokens": [[1]]}, "tokens"), ({"ranks": 99}, None)):
        refused = running.http.post("/v1/plans/simulate", json={**body, **wrong}, timeout=90)
        error = error_of(refused, 422, "invalid_setting")
        assert param is None or error["param"] == param
    error_of(running.http.post("/v1/plans/simulate", json={**body, "recording": "x"}), 404, "unknown_recording")


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ({"cost_model": "{secret}"}, "invalid_setting", "cost_model"),
        ({"settings": {"cost_model": "{secret}"}}, "invalid_setting", "cost_model"),
        ({"cost_model": 5}, "invalid_request", "cost_model"),
        ({"settings": []}, "invalid_request", "settings"),
        ({"max_steps": 0}, "invalid_request", "max_steps"),
        ({"max_steps": -1}, "invalid_request", "max_steps"),
        ({"max_steps": 5001}, "invalid_request", "max_steps"),
        ({"max_steps": "5"}, "invalid_request", "max_steps"),
        ({"ranks": "8"}, "invalid_request", "ranks"),
        ({"ranks": True}, "invalid_request", "ranks"),
        ({"ranks": 0}, "invalid_request", "ranks"),
        ({"ranks": 10**400}, "invalid_request", "ranks"),
        ({"ranks_per_node": 1.5}, "invalid_request", "ranks_per_node"),
        ({"recording": 5}, "invalid_request", "recording"),
    ],
)
def test_bad_replays(
    recording: tuple[Running, str], tmp_path: Path, wrong: dict[str, Any], code: str, param: str
) -> None:
    running, id = recording
    secret = tmp_path / "secret.yaml"
    secret.write_text("password: hunter2\n")
    body = json.dumps({"recording": id, "max_steps": 2, **wrong}).replace("{secret}", str(secret))
    headers = {"Content-Type": "application/json"}
    refused = running.http.post("/v1/plans/simulate", content=body, headers=headers, timeout=90)
    assert error_of(refused, 422, code)["param"] == param
    assert "password" not in refused.text


def test_replays_are_copied_one_at_a_time_in_their_minute(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy takes up to twice a recording's size, and to fetch it takes as long as the network wants."""
    id = recorded(running, tmp_path / "made")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(simulation, "TIMEOUT_S", 1.0)
    is_slow, most, statuses = True, 0, []
    read = running.caller.scheduler.recording_read

    async def read_slowly(**arguments: Any) -> bytes:
        nonlocal most
        most = max(most, len(list(tmp_path.glob(f"{COPY_PREFIX}*"))))
        await asyncio.sleep(30 if is_slow else 0)
        return await read(**arguments)

    monkeypatch.setattr(running.caller.scheduler, "recording_read", read_slowly)

    def replay() -> None:
        with httpx.Client(base_url=running.url, timeout=90, trust_env=False) as http:
            statuses.append(http.post("/v1/plans/simulate", json={"recording": id, "max_steps": 2}).status_code)

    asking = [threading.Thread(target=replay) for _ in range(12)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert most == 1 and Counter(statuses) == {504: 9, 503: 3}
    assert list(tmp_path.glob(f"{COPY_PREFIX}*")) == []
    is_slow = False
    monkeypatch.setattr(simulation, "TIMEOUT_S", 60.0)
    replay()
    assert statuses[-1] == 200


def test_copies_that_nobody_holds_are_swept(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    id = recorded(running, tmp_path / "made")
    left = tmp_path / f"{COPY_PREFIX}of-one-that-was-killed"
    left.mkdir()
    (left / "recording.tar").write_bytes(b"...")

    async def swept() -> list[Path]:
        async with copy_of(running.app.state.scheduler, id) as folder:
            sweep_copies()
            assert list(folder.glob("*.parquet"))
            return list(tmp_path.glob(f"{COPY_PREFIX}*"))

    assert left not in running.await_(swept())
    assert list(tmp_path.glob(f"{COPY_PREFIX}*")) == []


@pytest.fixture(scope="module")
def recording(unchanged: Running, tmp_path_factory: pytest.TempPathFactory) -> tuple[Running, str]:
    """A server and the id of a recording there."""
    return unchanged, recorded(unchanged, tmp_path_factory.mktemp("made"))
