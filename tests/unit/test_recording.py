"""The recording of the plugin: layers become steps, parts become whole by themselves, a full disk ends just that."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest

from llep.errors import UnsupportedConfiguration
from llep.shapes import ModelShape
from llep.traces import Trace
from llep.vllm_plugin import recording
from llep.vllm_plugin.recording import Recording, start_recording

SHAPE = ModelShape(name="model", layer_numbers=(1, 3), num_experts=4, top_k=2)


def add_step(written: Recording, step: int, phase: str = "prefill", sources: int = 2, tokens: int = 10) -> None:
    for layer in range(2):
        written.add(step, phase, layer, np.full((sources, 4), tokens + layer, dtype=np.int64))


def test_off_unless_a_folder_is_named(tmp_path: Path) -> None:
    assert start_recording("engine", SHAPE, 2, {}) is None
    assert start_recording("engine", SHAPE, 2, {"LLEP_RECORD_DIR": ""}) is None
    assert list(tmp_path.iterdir()) == []


def test_steps_are_what_was_added(tmp_path: Path) -> None:
    written = start_recording("engine-1", SHAPE, 2, {"LLEP_RECORD_DIR": str(tmp_path)})
    assert written is not None
    add_step(written, 5)
    add_step(written, 9, "decode")
    written.add(10, "decode", 0, np.ones((2, 4), dtype=np.int64))  # the step's other layer never comes
    written.finish()
    trace = Trace(tmp_path / "engine-1")
    assert (trace.shape, trace.num_ranks) == (SHAPE, 2)
    steps = list(trace.steps())
    assert [(step.step, step.phase) for step in steps] == [(5, "prefill"), (9, "decode")]
    for step in steps:
        assert (step.counts_LRE == np.array([10, 11])[:, None, None]).all()


def test_replicated_tokens_are_dealt_out(tmp_path: Path) -> None:
    written = Recording(tmp_path / "r", SHAPE, 2)
    add_step(written, 1, sources=1, tokens=7)
    written.finish()
    (step,) = Trace(tmp_path / "r").steps()
    assert (step.counts_LRE.sum(axis=1) == np.array([[7], [8]])).all()
    assert np.ptp(step.counts_LRE[0], axis=0).max() == 1


def test_parts_become_whole_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PART_S", 0.05)
    written = Recording(tmp_path / "r", SHAPE, 2)
    add_step(written, 1)
    deadline_s = time.monotonic() + 10
    while not list((tmp_path / "r").glob("part-*.parquet")):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    add_step(written, 2)
    written.finish()
    assert [step.step for step in Trace(tmp_path / "r").steps()] == [1, 2]


def test_it_ends_when_it_is_large(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = Recording(tmp_path / "r", SHAPE, 2, max_bytes=1)
    with caplog.at_level(logging.WARNING, logger="vllm.llep"):
        for step in range(4):
            add_step(written, step)
    assert "ends, serving goes on" in caplog.text
    assert len(list(Trace(tmp_path / "r").steps())) < 4


def test_trouble_with_the_disk_ends_it_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = Recording(tmp_path / "r", SHAPE, 2)
    (tmp_path / "r").rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, logger="vllm.llep"):
        add_step(written, 1)
        add_step(written, 2)
        written.finish()
    assert caplog.text.count("ends, serving goes on: step 1 can't be written") == 1


def test_a_folder_that_cant_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedConfiguration, match="LLEP_RECORD_DIR=.*file.* can't be recorded to.*unset it"):
        start_recording("engine", SHAPE, 2, {"LLEP_RECORD_DIR": str(tmp_path / "file")})
