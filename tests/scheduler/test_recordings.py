"""Recordings on their way from rank 0's disk to whoever reads them, with real files and without Ray."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from llep.errors import (
    LlepError,
    RecordingConflict,
    SchedulerUnreachable,
    SettingsError,
    StoreUnavailable,
    UnknownEngine,
    UnknownRecording,
)
from llep.messages import RecordingOrder, decode_directive, encode
from llep.scheduler import archive, recordings, uploads
from llep.scheduler.actor import Scheduler
from llep.scheduler.archive import Archive
from llep.scheduler.uploads import Uploads
from llep.shapes import ModelShape
from llep.spool import orders
from llep.traces import Trace, unpacked
from llep.vllm_plugin.recording import Recorder
from tests.scheduler.peer import Workers
from tests.scheduler.test_actor import hear, run, scheduler_in

SHAPE = ModelShape(name="one", layer_numbers=(0, 1, 2), num_experts=4, top_k=2)
MIB = 1 << 20


class Link:
    """A SchedulerClient without a process between, whose answers to some calls are lost."""

    def __init__(self, scheduler: Scheduler, loses: Collection[int] = ()) -> None:
        self.scheduler, self.loses, self.calls = scheduler, loses, 0

    async def call(self, method: str, *args: Any, timeout_s: float = 0) -> Any:
        self.calls += 1
        answer = await getattr(self.scheduler, method)(*args)
        if self.calls in self.loses:
            raise SchedulerUnreachable("away")
        return answer


class Engine:
    """Rank 0's recorder beside workers that report, and the agent's uploads."""

    def __init__(self, scheduler: Scheduler, spool: Path, incarnation: str = "life") -> None:
        self.workers = Workers("one", ep_size=2, num_layers=3)
        self.recorder = Recorder(spool, "one", incarnation, SHAPE, 2)
        self.link = Link(scheduler)
        self.uploads = Uploads("one", self.link, lambda: spool)  # type: ignore[arg-type]
        self.spool = spool
        self.order: RecordingOrder | None = None

    async def hear(self) -> None:
        """Report, and follow what the scheduler says."""
        reports = [encode(report) for report in self.workers.reports()]
        answer = await self.link.scheduler.report(reports, self.workers.held_revision)
        assert answer["refused"] == []
        if answer["directive"]:
            directive = decode_directive(answer["directive"])
            self.workers.take(directive)
            self.order = directive.recording
        self.recorder.follow(self.order, 64 * MIB)

    def steps(self, first: int, count: int) -> None:
        """Returns when they are written."""
        for step in range(first, first + count):
            for layer in range(3):
                self.recorder.add(step, "prefill", layer, np.full((2, 4), step + layer, dtype=np.int64))
        if self.recorder._ordered is not None:
            self.recorder._ordered.finish()

    async def carry(self) -> None:
        """One round of the agent."""
        for folder, order in orders(self.spool, "one"):
            await self.uploads._carry(folder, order)

    async def carried(self, id: str, state: str = "done") -> dict[str, Any]:
        """The recording once it has ended: its end is noted by a thread."""
        deadline_s = time.monotonic() + 20
        while (view := await self.link.scheduler.recording(id))["state"] != state:
            assert time.monotonic() < deadline_s, view
            await asyncio.sleep(0.05)
            await self.carry()
        return view


async def whole(scheduler: Scheduler, id: str, size: int = 1000) -> bytes:
    data = b""
    while chunk := await scheduler.recording_read(id, len(data), size):
        data += chunk
    return data


def test_a_recording_arrives_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 700)

    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            view = await scheduler.recording_start("one", "me", steps=3, reason="why not")
            assert (view["state"], view["steps_wanted"], view["data_bytes"]) == ("ordered", 3, 0)
            id = view["id"]
            await engine.hear()
            engine.steps(10, 5)
            await engine.carry()
            view = await engine.carried(id)
            assert (view["steps"], view["problem"], view["reason"]) == (3, "", "why not")
            assert list((tmp_path / "spool").iterdir()) == []
            data = await whole(scheduler, id)
            assert len(data) == view["data_bytes"] and data == await whole(scheduler, id, 1 << 20)
            assert await scheduler.recording_read(id, len(data), 10) == b""
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                assert [member.name for member in tar] == [f"{id}/part-000000.parquet"]
            (tmp_path / "got.tar").write_bytes(data)
            with unpacked(tmp_path / "got.tar") as folder:
                steps = list(Trace(folder).steps())
            assert [step.step for step in steps] == [10, 11, 12] and (steps[0].counts_LRE[1] == 11).all()
            await engine.hear()
            assert engine.order is None  # withdrawn with its end
            kinds = [event["kind"] for event in await scheduler.events()]
            assert kinds.count("recording") == 3  # ordered, withdrawn, ended
            again = await scheduler.recording_start("one", "me")
            assert [one["id"] for one in await scheduler.recordings()] == [again["id"], id]

    run(body)


def test_stopping_brings_what_there_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", duration_s=600))["id"]
            await engine.hear()
            engine.steps(1, 4)
            await engine.carry()
            assert (await scheduler.recording(id))["state"] == "running"
            with pytest.raises(RecordingConflict, match="is being recorded: stop it with"):
                await scheduler.recording_start("one", "me")
            await scheduler.recording_stop(id, "me")
            await engine.hear()
            view = await engine.carried(id)
            assert view["steps"] == 4 and view["data_bytes"] > 0
            with pytest.raises(RecordingConflict, match="is done: nothing to stop"):
                await scheduler.recording_stop(id, "me")

    run(body)


def test_scheduler_and_agent_may_end_in_the_middle_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 300)

    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", steps=4))["id"]
            await engine.hear()
            engine.steps(1, 4)
            link = engine.link
            for last in (2, 4, 6):
                link.loses = [last]
                with pytest.raises(SchedulerUnreachable):
                    await engine.carry()
                engine.uploads = Uploads("one", link, lambda: engine.spool)  # type: ignore[arg-type]
            assert (await scheduler.recording(id))["data_bytes"] == 0
        async with scheduler_in(tmp_path / "state") as scheduler:
            assert (await scheduler.recording(id))["state"] == "running"
            link.scheduler = scheduler
            view = await engine.carried(id)
            assert view["steps"] == 4
            (tmp_path / "got.tar").write_bytes(await whole(scheduler, id))
            with unpacked(tmp_path / "got.tar") as folder:
                assert [step.step for step in Trace(folder).steps()] == [1, 2, 3, 4]

    run(body)


def test_an_engine_that_starts_anew_fails_its_recording_and_keeps_what_was_there(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", duration_s=600))["id"]
            await engine.hear()
            engine.steps(1, 2)
            assert engine.recorder._ordered is not None
            engine.recorder._ordered.finish()
            reborn = Engine(scheduler, tmp_path / "spool", "another life")
            view = await reborn.carried(id, "failed")
            assert view["problem"] == "the engine ended before the recording did" and view["data_bytes"] > 0

    run(body)


def test_a_recording_whose_end_never_comes_fails_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "END_GRACE_S", 0.2)

    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", duration_s=0.1))["id"]
            await asyncio.sleep(0.4)
            view = await scheduler.recording(id)
            assert view["state"] == "failed" and view["problem"].startswith("nothing arrived: the engine ran no step")
            await engine.hear()
            assert engine.order is None

    run(body)


def test_a_failing_disk_is_told_and_nothing_else_suffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", steps=2))["id"]
            await engine.hear()
            engine.steps(1, 2)

            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(archive, "os", SimpleNamespace(fsync=full))
            with pytest.raises(StoreUnavailable, match="No space left"):
                await engine.carry()
            monkeypatch.setattr(archive, "os", os)
            view = await scheduler.recording(id)
            assert "No space left" in view["problem"]
            assert await hear(scheduler, engine.workers) == []  # reports go on
            view = await engine.carried(id)
            assert view["problem"] == "" and view["steps"] == 2

    run(body)


def test_deleting_stops_it_and_the_agent_drops_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path / "state") as scheduler:
            engine = Engine(scheduler, tmp_path / "spool")
            await engine.hear()
            id = (await scheduler.recording_start("one", "me", duration_s=600))["id"]
            await engine.hear()
            engine.steps(1, 2)
            assert (await scheduler.recording_delete(id, "me"))["state"] == "deleted"
            await engine.hear()
            deadline_s = time.monotonic() + 20
            while orders(tmp_path / "spool", "one"):
                assert time.monotonic() < deadline_s
                await engine.carry()
                await asyncio.sleep(0.05)
            for question in (
                scheduler.recording(id),
                scheduler.recording_read(id, 0, 10),
                scheduler.recording_delete(id, "me"),
                scheduler.recording_stop("nonsense/../..", "me"),
            ):
                with pytest.raises(UnknownRecording):
                    await question
            assert list((tmp_path / "state" / archive.FOLDER).iterdir()) == []

    run(body)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"engine": "ghost"}, UnknownEngine),
        ({"duration_s": 0}, SettingsError),
        ({"duration_s": float("nan")}, SettingsError),
        ({"duration_s": 1e9}, SettingsError),
        ({"steps": 0}, SettingsError),
        ({"max_bytes": 1}, SettingsError),
        ({"reason": "x" * 5000}, SettingsError),
    ],
)
def test_impossible_orders_are_refused(wanted: dict[str, Any], error: type[LlepError], tmp_path: Path) -> None:
    async def body() -> None:
        async with scheduler_in(tmp_path) as scheduler:
            await hear(scheduler, Workers("one"))
            with pytest.raises(error):
                await scheduler.recording_start(**{"engine": "one", "author": "me", **wanted})
            assert await scheduler.recordings() == []

    run(body)


def archived(folder: Path, **limits: int) -> Archive:
    return Archive(folder, **limits)


def described(id: str, state: str = "done", created_s: float = 0.0) -> archive.Recording:
    return archive.Recording(
        id=id,
        engine="one",
        state=state,
        author="",
        reason="",
        created_s=created_s,
        until_s=0,
        duration_s=None,
        steps_wanted=None,
        max_bytes=MIB,
    )


def test_an_archive_is_bounded_and_found_again_by_its_files(tmp_path: Path) -> None:
    kept = archived(tmp_path, most_recordings=3)
    for number in range(5):
        kept.put(described(f"r{number}", created_s=number))
        kept.append(f"r{number}", "part-000000.parquet", 0, b"x" * 1000, is_whole=True)
    assert [one.id for one in kept.all()] == ["r4", "r3", "r2"]
    (tmp_path / archive.FOLDER / "r3" / archive.DESCRIPTION).write_text("{")
    (tmp_path / archive.FOLDER / "r4" / archive.DESCRIPTION).unlink()
    again = archived(tmp_path)
    assert {one.id: one.state for one in again.all()} == {"r2": "done", "r3": "failed", "r4": "failed"}
    assert "description can't be read" in again.get("r3").problem and again.part_bytes("r3") == 1000
    again.delete("r3")
    assert "r3" not in os.listdir(tmp_path / archive.FOLDER)
    running = archived(tmp_path, most_recordings=2)
    running.put(described("new", "running", 9))
    running.put(described("newer", "running", 10))
    with pytest.raises(RecordingConflict, match="no more at once"):
        running.put(described("newest", "ordered", 11))


def test_recordings_leave_room_on_the_disk_for_the_scheduler_s_state(tmp_path: Path) -> None:
    kept = archived(tmp_path, reserved_bytes=0)
    kept.put(described("r", "running"))
    kept.append("r", "part-000000.parquet", 0, b"abc", is_whole=False)
    full = archived(tmp_path, reserved_bytes=1 << 60)
    with pytest.raises(RecordingConflict, match=r"MiB free, of which .* kept for the scheduler's state"):
        full.append("r", "part-000000.parquet", 3, b"d", is_whole=False)
    with pytest.raises(RecordingConflict, match="delete recordings"):
        full.put(described("new", "ordered"))
    assert full.have("r") == {"part-000000.parquet.partial": 3} and len(full.all()) == 1


def test_parts_take_no_gap_no_foreign_name_and_no_more_than_there_is_room(tmp_path: Path) -> None:
    kept = archived(tmp_path, most_bytes=3 * MIB)
    kept.put(described("r", "running"))
    name = "part-000000.parquet"
    assert kept.append("r", name, 0, b"abc", is_whole=False) == {name + ".partial": 3}
    assert kept.append("r", name, 1, b"bcd", is_whole=False) == {name + ".partial": 4}  # what is here is left out
    for bad, offset, data in (
        (name, 9, b"x"),
        ("../../evil.parquet", 0, b"x"),
        ("recording.json", 0, b"x"),
        (name, 4, bytes(4 * MIB)),
    ):
        with pytest.raises(RecordingConflict):
            kept.append("r", bad, offset, data, is_whole=True)
    assert kept.append("r", name, 4, b"", is_whole=True) == {name: 4}
    assert kept.append("r", name, 4, b"more", is_whole=True) == {name: 4}  # whole is whole
    assert kept.read("r", 512, 4) == b"abcd"
    assert kept.view(msgspec.structs.replace(kept.get("r"), state="done")).data_bytes == len(kept.read("r", 0, 1 << 20))
