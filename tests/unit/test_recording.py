"""The recordings of the plugin: layers become steps, they end as ordered, a failing disk ends just them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llep.errors import UnsupportedConfiguration
from llep.messages import RecordingOrder
from llep.shapes import ModelShape
from llep.spool import END, End, orders, read_end, write_note
from llep.traces import Trace
from llep.vllm_plugin import recording
from llep.vllm_plugin.recording import Recorder, Recording

SHAPE = ModelShape(name="model", layer_numbers=(1, 3), num_experts=4, top_k=2)
MIB = 1 << 20


def add_step(
    written: Recording | Recorder, step: int, phase: str = "prefill", sources: int = 2, tokens: int = 10
) -> None:
    for layer in range(2):
        written.add(step, phase, layer, np.full((sources, 4), tokens + layer, dtype=np.int64))


def recorder_in(base: Path, incarnation: str = "life") -> Recorder:
    return Recorder(base, "engine", incarnation, SHAPE, 2)


def order(id: str = "id", seconds: float = 60, steps: int = 0, most_bytes: int = 0) -> RecordingOrder:
    return RecordingOrder(id, time.time() + seconds, steps, most_bytes)


def wait_for(what: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def steps_in(folder: Path) -> list[int]:
    return [step.step for step in Trace(folder).steps()]


def test_steps_are_what_was_added(tmp_path: Path) -> None:
    written = Recording(tmp_path / "r", SHAPE, 2, max_bytes=MIB)
    written.add(4, "decode", 1, np.ones((2, 4), dtype=np.int64))  # began in the middle of a step
    add_step(written, 5)
    add_step(written, 9, "decode")
    written.add(10, "decode", 0, np.ones((2, 4), dtype=np.int64))  # the step's other layer never comes
    written.finish()
    trace = Trace(tmp_path / "r")
    assert (trace.shape, trace.num_ranks) == (SHAPE, 2)
    steps = list(trace.steps())
    assert [(step.step, step.phase) for step in steps] == [(5, "prefill"), (9, "decode")]
    for step in steps:
        assert (step.counts_LRE == np.array([10, 11])[:, None, None]).all()


def test_an_idle_engine_ends_what_was_stopped(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order(), MIB)
    add_step(recorder, 1)
    recorder.release(order())  # the newest revision still orders it
    time.sleep(0.1)
    assert read_end(tmp_path / "id") is None
    recorder.release(None)  # held, but no step comes in which it could go live
    wait_for(lambda: read_end(tmp_path / "id") is not None)
    assert (read_end(tmp_path / "id"), steps_in(tmp_path / "id")) == (End(1, ""), [1])


def test_replicated_tokens_are_dealt_out(tmp_path: Path) -> None:
    written = Recording(tmp_path / "r", SHAPE, 2, max_bytes=MIB)
    add_step(written, 1, sources=1, tokens=7)
    written.finish()
    (step,) = Trace(tmp_path / "r").steps()
    assert (step.counts_LRE.sum(axis=1) == np.array([[7], [8]])).all()
    assert np.ptp(step.counts_LRE[0], axis=0).max() == 1


def test_parts_become_whole_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PART_S", 0.05)
    written = Recording(tmp_path / "r", SHAPE, 2, max_bytes=MIB)
    add_step(written, 1)
    wait_for(lambda: bool(list((tmp_path / "r").glob("part-*.parquet"))))
    add_step(written, 2)
    written.finish()
    assert steps_in(tmp_path / "r") == [1, 2]


def test_an_order_is_followed_until_its_steps_are_there(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order(steps=2), MIB)
    for step in range(5):
        add_step(recorder, step)
    wait_for(lambda: read_end(tmp_path / "id") == End(2, ""))
    assert steps_in(tmp_path / "id") == [0, 1]
    ((folder, found),) = orders(tmp_path, "engine")
    assert folder == tmp_path / "id" and (found.id, found.incarnation) == ("id", "life")
    assert orders(tmp_path, "another") == []
    shutil.rmtree(tmp_path / "id")  # fetched
    recorder.follow(order(steps=2), MIB)  # the same order under the next revision
    add_step(recorder, 9)
    assert list(tmp_path.iterdir()) == []


def test_an_order_ends_in_time_even_without_a_step_and_one_that_is_over_is_not_begun(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order("idle", seconds=0.3), MIB)
    wait_for(lambda: read_end(tmp_path / "idle") == End(0, ""))
    recorder.follow(order("late", seconds=-1), MIB)
    add_step(recorder, 1)
    assert not (tmp_path / "late").exists()


def test_an_order_ends_when_it_is_withdrawn_or_another_comes(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order("one"), MIB)
    add_step(recorder, 1)
    recorder.follow(order("two"), MIB)
    add_step(recorder, 2)
    recorder.follow(None, MIB)
    add_step(recorder, 3)
    wait_for(lambda: read_end(tmp_path / "one") == read_end(tmp_path / "two") == End(1, ""))
    assert (steps_in(tmp_path / "one"), steps_in(tmp_path / "two")) == ([1], [2])


def test_it_ends_when_it_is_large(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order(most_bytes=1), MIB)
    for step in range(4):
        add_step(recorder, step)
    wait_for(lambda: read_end(tmp_path / "id") is not None)
    assert len(steps_in(tmp_path / "id")) < 4


def test_what_a_former_life_left_open_is_ended_by_the_next(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path, "first")
    recorder.follow(order("open"), MIB)
    add_step(recorder, 1)
    recorder_in(tmp_path, "first")  # the same life: nothing to end
    assert read_end(tmp_path / "open") is None
    second = recorder_in(tmp_path, "second")
    end = read_end(tmp_path / "open")
    assert end is not None and end.problem == "the engine ended before the recording did"
    second.follow(order("open"), MIB)  # it is told the same again
    add_step(second, 1)
    assert read_end(tmp_path / "open") == end


def test_trouble_with_the_disk_ends_it_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = recorder_in(tmp_path)
    recorder.follow(order(), MIB)
    (tmp_path / "id").rename(tmp_path / "gone")
    (tmp_path / "id").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="vllm.llep"):
        add_step(recorder, 1)
        add_step(recorder, 2)
        wait_for(lambda: "can't be written" in caplog.text)
    assert caplog.text.count("ends after 0 steps, serving goes on: step 1 can't be written") == 1
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="vllm.llep"):
        Recorder(tmp_path / "file", "engine", "life", SHAPE, 2).follow(order("x"), MIB)
    assert "recording x can't be written, serving goes on" in caplog.text


def test_from_the_start_only_where_that_is_asked_for(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    recorder.record_from_start(MIB, {"LLEP_RECORD_FROM_START": "0"})
    recorder.record_from_start(MIB, {})
    assert list(tmp_path.iterdir()) == []
    recorder.record_from_start(MIB, {"LLEP_RECORD_FROM_START": "1"})
    recorder.follow(order(), MIB)
    add_step(recorder, 1)
    recorder.follow(None, MIB)
    add_step(recorder, 2)
    assert recorder._from_start is not None
    recorder._from_start.finish()
    wait_for(lambda: read_end(tmp_path / "id") is not None)
    assert (steps_in(tmp_path / "engine-life"), steps_in(tmp_path / "id")) == ([1, 2], [1])
    assert [found.id for _, found in orders(tmp_path, "engine")] == ["id"]  # what nobody ordered is not fetched
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedConfiguration, match="can't be recorded to .*: set record_dir to another folder"):
        Recorder(tmp_path / "file", "engine", "life", SHAPE, 2).record_from_start(MIB, {"LLEP_RECORD_FROM_START": "1"})


def test_a_note_is_all_there_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / END).write_text("{")
    assert read_end(tmp_path) is None
    write_note(tmp_path / END, End(3, "full"))
    assert read_end(tmp_path) == End(3, "full") and [path.name for path in tmp_path.iterdir()] == [END]


def test_a_disk_that_is_too_slow_costs_steps_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_WAITING_BYTES", 0)
    written = Recording(tmp_path / "r", SHAPE, 2, max_bytes=MIB)
    with written._lock:  # as if a write took very long
        start_s = time.monotonic()
        for step in range(20):
            add_step(written, step)
        assert time.monotonic() - start_s < 1
    written.finish()
    kept = steps_in(tmp_path / "r")
    assert len(kept) + written.skipped == 20 and written.skipped > 10 and kept == sorted(kept)
