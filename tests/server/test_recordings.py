"""Recordings as resources, and what is made of them: replayed, tuned for, as operations that can be cancelled."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from reporting import Engine
from running import Running
from test_http import error_of

from llep.generate import Workload, generate_steps
from llep.shapes import ModelShape
from llep.traces import Trace, TraceWriter
from llep_server import operations, recordings
from llep_server.recordings import Part, parse_range, unpack

SHAPE = ModelShape(
    name="tiny", layer_numbers=(1, 2, 5), num_experts=16, top_k=4, hidden_size=64, intermediate_size=64,
    bytes_per_expert=3_000_000,
)  # fmt: skip


def recorded(running: Running, folder: Path, steps: int = 40) -> str:
    """Id of a recording that has been ordered over HTTP, and told by the engine's agent."""
    running.report(Engine())
    ordered = running.http.post("/v1/recordings", json={"duration_s": 60, "reason": "to see"})
    assert ordered.status_code == 201, ordered.text
    id = str(ordered.json()["id"])
    assert ordered.headers["Location"] == f"/v1/recordings/{id}" and ordered.json()["state"] == "ordered"
    workload = generate_steps(
        Workload.parse("zipf:ratio=1.7"), SHAPE, num_ranks=2, tokens_per_rank=4096, steps=steps, seed=1
    )
    with TraceWriter(folder, SHAPE, 2) as writer:
        for step in workload:
            writer.append(step)
    scheduler = running.caller.scheduler
    running.await_(scheduler.recording_begun("tiny", id))
    for part in sorted(folder.glob("*.parquet")):
        running.await_(scheduler.recording_part("tiny", id, part.name, 0, part.read_bytes(), True))
    running.await_(scheduler.recording_end("tiny", id, steps, ""))
    return id


def ended(running: Running, id: str, timeout_s: float = 120) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        operation: dict[str, Any] = running.http.get(f"/v1/operations/{id}").json()
        if operation["state"] not in ("waiting", "running"):
            return operation
        assert time.monotonic() < deadline_s, operation
        time.sleep(0.1)


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


def test_before_the_end_there_is_nothing_to_fetch(running: Running) -> None:
    running.report(Engine())
    id = running.http.post("/v1/recordings", json={"steps": 5}).json()["id"]
    error_of(running.http.get(f"/v1/recordings/{id}/data"), 409, "recording_conflict")
    error_of(running.http.post("/v1/tuning", json={"recording": id}), 409, "recording_conflict")
    error_of(running.http.post("/v1/recordings", json={"steps": 5}), 409, "recording_conflict")
    assert running.http.post(f"/v1/recordings/{id}/stop").status_code == 200
    kinds = [event["kind"] for event in running.http.get("/v1/events").json()["data"]]
    assert "recording" in kinds


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


def test_tuning_ranks_settings_and_names_the_patch(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made")
    started = running.http.post("/v1/tuning", json={"recording": id, "base": {"min_chunk_tokens": 65536}})
    assert started.status_code == 202
    operation = ended(running, started.headers["Location"].rpartition("/")[2])
    assert operation["state"] == "done", operation
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


def test_an_operation_is_cancelled_and_the_next_one_runs(running: Running, tmp_path: Path) -> None:
    id = recorded(running, tmp_path / "made", steps=400)
    first, second = (running.http.post("/v1/tuning", json={"recording": id}).json()["id"] for _ in range(2))
    cancelled = running.http.delete(f"/v1/operations/{first}").json()
    assert cancelled["state"] == "cancelled"
    assert ended(running, second)["state"] == "done"


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
