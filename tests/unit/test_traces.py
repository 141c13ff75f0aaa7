"""Recordings come back as they were written; what is broken is named, and nothing that was whole is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llep.generate import Workload, generate_steps
from llep.shapes import ModelShape, StepCounts
from llep.traces import METADATA_KEY, Trace, TraceError, TraceWriter, write_trace

SHAPE = ModelShape(name="small", layer_numbers=(1, 2, 7), num_experts=16, top_k=4, bytes_per_expert=1000)
RANKS = 4


def some_steps(count: int, tokens_per_rank: int = 50, seed: int = 0) -> list[StepCounts]:
    workload = Workload(kind="zipf", ratio=2.0, sources="zero")
    made = generate_steps(
        workload, SHAPE, num_ranks=RANKS, tokens_per_rank=tokens_per_rank, steps=count, seed=seed, phase="decode"
    )
    return [step._replace(phase="prefill") if step.step % 3 == 0 else step for step in made]


def assert_equal(found: list[StepCounts], expected: list[StepCounts]) -> None:
    assert [(step.step, step.phase) for step in found] == [(step.step, step.phase) for step in expected]
    for left, right in zip(found, expected, strict=True):
        assert (left.counts_LRE == right.counts_LRE).all()


def a_trace(folder: Path, count: int = 10, part_rows: int = 500) -> list[StepCounts]:
    steps = some_steps(count)
    write_trace(folder, SHAPE, RANKS, steps, part_rows=part_rows)
    assert len(list(folder.glob("part-*.parquet"))) > 2
    return steps


@pytest.mark.parametrize("part_rows", [1, 500, 10**9])
def test_round_trip(tmp_path: Path, part_rows: int) -> None:
    steps = some_steps(10)
    write_trace(tmp_path / "t", SHAPE, RANKS, steps, part_rows=part_rows)
    trace = Trace(tmp_path / "t")
    assert (trace.shape, trace.num_ranks, trace.num_steps()) == (SHAPE, RANKS, 10)
    assert trace.num_rows() == sum(np.count_nonzero(step.counts_LRE) for step in steps)
    assert_equal(list(trace.steps()), steps)
    assert not trace.broken and not trace.unfinished
    assert trace.transitions() is None


def test_steps_that_span_batches_of_reading_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = a_trace(tmp_path / "t")
    monkeypatch.setattr("llep.traces.READ_ROWS", 37)
    assert_equal(list(Trace(tmp_path / "t").steps()), steps)


def test_any_tool_reads_the_documented_columns(tmp_path: Path) -> None:
    steps = a_trace(tmp_path / "t")
    table = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "t").glob("part-*.parquet")))
    assert table.schema.names == ["model", "layer", "step", "phase", "rank", "expert", "tokens"]
    row = table.slice(table.num_rows // 2, 1).to_pylist()[0]
    layer = SHAPE.layer_numbers.index(row["layer"])
    assert row["model"] == "small"
    assert row["phase"] == steps[row["step"]].phase
    assert row["tokens"] == steps[row["step"]].counts_LRE[layer, row["rank"], row["expert"]]
    assert min(table["tokens"].to_pylist()) > 0


def test_a_single_part_can_be_read_by_itself(tmp_path: Path) -> None:
    steps = a_trace(tmp_path / "t")
    first = list(Trace(tmp_path / "t" / "part-000000.parquet").steps())
    assert 0 < len(first) < len(steps)
    assert_equal(first, steps[: len(first)])


def test_transitions_add_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 3, size=(2, 16, 16)) for _ in range(3)]
    with TraceWriter(tmp_path / "t", SHAPE, RANKS) as writer:
        for step, window in zip(some_steps(3), windows, strict=True):
            writer.append(step)
            writer.append_transitions(step.step, window)
        with pytest.raises(TraceError, match=r"transitions must have shape \(2, 16, 16\), got \(3, 16, 16\)"):
            writer.append_transitions(3, np.zeros((3, 16, 16), dtype=np.int64))
    found = Trace(tmp_path / "t").transitions()
    assert found is not None
    assert (found == sum(windows)).all()


def test_a_killed_writer_loses_at_most_the_part_in_hand(tmp_path: Path) -> None:
    code = """
    import sys
    from pathlib import Path
    from tests.unit.test_traces import RANKS, SHAPE, some_steps
    from llep.traces import TraceWriter
    writer = TraceWriter(Path(sys.argv[1]), SHAPE, RANKS, part_rows=500)
    for step in some_steps(1000):
        writer.append(step)
        print(step.step, flush=True)
        if step.step == 25:
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "t")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdin is not None
    with process.stdout, process.stdin:
        assert any(line == "25\n" for line in process.stdout)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    trace = Trace(tmp_path / "t")
    found = list(trace.steps())
    assert len(found) >= 20
    assert_equal(found, some_steps(1000)[: len(found)])
    assert len(trace.unfinished) == 1


def test_killed_before_the_first_part_was_whole(tmp_path: Path) -> None:
    (tmp_path / "part-000000.parquet.unfinished").write_bytes(b"PAR1")
    with pytest.raises(TraceError, match="holds no whole part: the recording was stopped hard"):
        Trace(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_part_is_named_and_the_others_can_be_read(tmp_path: Path, keep: float) -> None:
    steps = a_trace(tmp_path / "t")
    part = tmp_path / "t" / "part-000001.parquet"
    data = part.read_bytes()
    lost = {step.step for step in Trace(part).steps()}
    part.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    trace = Trace(tmp_path / "t")
    assert [broken.path.name for broken in trace.broken] == ["part-000001.parquet"]
    with pytest.raises(
        TraceError, match="part-000001.parquet can't be read, truncated or not Parquet.*other parts are"
    ):
        list(trace.steps())
    kept = list(Trace(tmp_path / "t", skip_broken=True).steps())
    assert_equal(kept, [step for step in steps if step.step not in lost])


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    a_trace(tmp_path / "t")
    part = tmp_path / "t" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 4
    part.write_bytes(data)
    with pytest.raises(TraceError, match=r"part-000001.parquet (is damaged|can't be read)"):
        list(Trace(tmp_path / "t").steps())


def test_a_damaged_part_found_while_reading_can_be_skipped(tmp_path: Path) -> None:
    steps = a_trace(tmp_path / "t")
    part = tmp_path / "t" / "part-000001.parquet"
    lost = {step.step for step in Trace(part).steps()}
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 4
    part.write_bytes(data)
    trace = Trace(tmp_path / "t", skip_broken=True)
    found = list(trace.steps())
    kept = [step for step in steps if step.step not in lost]
    assert {step.step for step in kept} <= {step.step for step in found}
    assert [broken.path.name for broken in trace.broken] == ["part-000001.parquet"]


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "part-000000.parquet"
    path.write_text("model,layer\n")
    with pytest.raises(TraceError, match="truncated or not Parquet"):
        Trace(path)
    pq.write_table(pa.table({"expert": [1]}), path)
    with pytest.raises(TraceError, match="is Parquet, but not a recording: it lacks the columns model, layer, step"):
        Trace(path)
    table = pa.table({name: [1] for name in ("model", "layer", "step", "phase", "rank", "expert", "tokens")})
    pq.write_table(table, path)
    with pytest.raises(TraceError, match="not a recording: it lacks the key 'llep' in its metadata"):
        Trace(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b"[1]"}), path)
    with pytest.raises(TraceError, match="metadata under the key 'llep' that is not a recording's"):
        Trace(path)
    with pytest.raises(TraceError, match="does not exist: give the folder of a recording"):
        Trace(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TraceError, match=r"is not a recording: it holds no part-\*.parquet"):
        Trace(empty)


def rewritten(folder: Path, change_metadata: dict[str, object] | None = None, **columns: list[object]) -> Path:
    """A recording of one part, with its metadata or its columns changed."""
    write_trace(folder, SHAPE, RANKS, some_steps(2))
    path = folder / "part-000000.parquet"
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    for name, values in columns.items():
        column = values + table[name].to_pylist()[len(values) :]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(column))
    metadata.update(change_metadata or {})
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()}), path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rank": [4]}, r"rank must be in 0..3, got 4"),
        ({"expert": [-1]}, r"expert must be in 0..15, got -1"),
        ({"layer": [3]}, r"layer 3 is not one of the model's MoE layers"),
        ({"layer": [99]}, r"layer must be in 0..7, got 99"),
        ({"tokens": [-5]}, r"tokens must be >= 0, got -5"),
        ({"tokens": [None]}, r"column tokens holds 1 empty cells"),
        ({"tokens": [0.5]}, r"column tokens must hold int64, got double"),
        ({"phase": ["lunch"]}, r"phase must be one of prefill, decode, got 'lunch'"),
        ({"step": [5]}, r"step 0 follows step 5: steps must grow"),
        ({"expert": [15]}, r"rows of step 0 must be sorted by layer, rank and expert"),
        ({"step": [-1]}, r"step must be >= 0, got -1"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    trace = Trace(rewritten(tmp_path / "t", **columns))
    with pytest.raises(TraceError, match=message):
        list(trace.steps())


def test_another_version_says_so(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "t", {"version": 2})
    with pytest.raises(TraceError, match="is llep.trace version 2, this llep reads llep.trace version 1"):
        Trace(path)


def test_a_part_of_another_recording_is_broken_not_mixed_in(tmp_path: Path) -> None:
    a_trace(tmp_path / "t")
    other = ModelShape(name="other", layer_numbers=(1,), num_experts=16, top_k=4)
    steps = generate_steps(Workload(), other, num_ranks=RANKS, tokens_per_rank=9, steps=1)
    write_trace(tmp_path / "u", other, RANKS, steps)
    (tmp_path / "u" / "part-000000.parquet").rename(tmp_path / "t" / "part-000001.parquet")
    with pytest.raises(TraceError, match="part-000001.parquet is of another recording"):
        list(Trace(tmp_path / "t").steps())


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    step = some_steps(1)[0]
    with TraceWriter(tmp_path / "t", SHAPE, RANKS) as writer:
        with pytest.raises(TraceError, match=r"counts of step 0 must have shape \(3, 4, 16\), got \(2, 4, 16\)"):
            writer.append(step._replace(counts_LRE=step.counts_LRE[1:]))
        with pytest.raises(TraceError, match="counts of step 0 must be integers >= 0"):
            writer.append(step._replace(counts_LRE=-step.counts_LRE))
        with pytest.raises(TraceError, match="phase must be one of prefill, decode, got 'lunch'"):
            writer.append(step._replace(phase="lunch"))
        assert writer.append(step)
        with pytest.raises(TraceError, match="step 0 follows step 0: steps must grow"):
            writer.append(step)
    with pytest.raises(TraceError, match="is not empty: give a recording a folder of its own"):
        TraceWriter(tmp_path / "t", SHAPE, RANKS)
    assert_equal(list(Trace(tmp_path / "t").steps()), [step])


def test_max_bytes_stops_the_recording(tmp_path: Path) -> None:
    steps = some_steps(200)
    with TraceWriter(tmp_path / "t", SHAPE, RANKS, part_rows=500, max_bytes=20_000) as writer:
        written = [writer.append(step) for step in steps]
    assert 0 < sum(written) < 200
    assert written == sorted(written, reverse=True)
    size = sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    assert size == writer.bytes_written < 40_000
    assert_equal(list(Trace(tmp_path / "t").steps()), steps[: sum(written)])


def test_steps_without_tokens(tmp_path: Path) -> None:
    steps = [step._replace(counts_LRE=step.counts_LRE * (step.step != 2)) for step in some_steps(5)]
    write_trace(tmp_path / "t", SHAPE, RANKS, steps)
    assert_equal(list(Trace(tmp_path / "t").steps()), steps[:2] + steps[3:])
    assert Trace(tmp_path / "t").num_steps() == 5
    write_trace(tmp_path / "empty", SHAPE, RANKS, [steps[2]])
    assert list(Trace(tmp_path / "empty").steps()) == []
    assert Trace(tmp_path / "empty").num_steps() == 0


def test_memory_is_that_of_a_few_steps_not_of_the_recording(tmp_path: Path) -> None:
    shape = ModelShape(name="wide", layer_numbers=tuple(range(8)), num_experts=256, top_k=8)
    made = generate_steps(Workload(), shape, num_ranks=16, tokens_per_rank=4096, steps=120)
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    with TraceWriter(tmp_path / "t", shape, 16, part_rows=1_000_000) as writer:
        for step in made:
            writer.append(step)
    rows = 120 * 8 * 16 * 256
    assert Trace(tmp_path / "t").num_rows() > 0.99 * rows
    peak = 0
    for _ in Trace(tmp_path / "t").steps():
        peak = max(peak, pool.bytes_allocated())
    assert peak < 60e6 < rows * 40
    assert pool.max_memory() - before < 120e6
