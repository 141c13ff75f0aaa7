"""`llep simulate`, the real command: generated loads and recordings, every output, errors by name."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.commands import run_llep as llep

CODE = "from llep.cli import main; main()"
SMALL = ("--model", "gpt-oss-20b", "--layers", "2", "--steps", "3", "--tokens-per-rank", "512", "--ranks", "4")


def test_a_workload_as_json_with_a_chart_and_kept_as_a_recording(tmp_path: Path) -> None:
    chart, saved = tmp_path / "chart.html", tmp_path / "recording"
    options = ("--min-chunk-tokens", "64", "--planner", "home", "--planner", "quota")
    done = llep("simulate", "zipf:ratio=2", *SMALL, *options, "--chart", str(chart), "--save", str(saved), "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["source"] == "zipf:ratio=2" and found["model"] == "gpt-oss-20b" and found["steps"] == 3
    assert [planner["planner"] for planner in found["planners"]] == ["home", "quota"]
    assert found["planners"][0]["imbalance_ratio"]["mean"] == pytest.approx(2.0, rel=0.03)
    assert found["planners"][1]["imbalance_ratio"]["mean"] < 1.2
    assert chart.read_text().startswith("<!doctype html>")

    again = llep("simulate", str(saved), "--planner", "home", *options[:2], "-o", "json")
    assert again.returncode == 0, again.stderr
    replayed = json.loads(again.stdout)
    assert replayed["planners"][0]["imbalance_ratio"] == found["planners"][0]["imbalance_ratio"]
    assert replayed["ranks"] == 4
    wider = llep("simulate", str(saved), "--ranks", "16", "--ranks-per-node", "8", "--steps", "1", "-o", "json")
    assert json.loads(wider.stdout)["ranks"] == 16 and json.loads(wider.stdout)["steps"] == 1


def test_table_and_csv() -> None:
    table = llep("simulate", "zipf:ratio=2", *SMALL, "--cost-model", "h100")
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in ("home", "least_loaded", "quota", "ms/step", "of ideal"))
    rows = list(csv.DictReader(io.StringIO(llep("simulate", "zipf:ratio=2", *SMALL, "-o", "csv").stdout)))
    assert [row["planner"] for row in rows] == ["home", "least_loaded", "quota"]
    assert float(rows[0]["imbalance"]) == pytest.approx(2.0, rel=0.03)


def test_a_bar_on_a_terminal_and_no_escape_codes_elsewhere() -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", CODE, "simulate", "zipf:ratio=2", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert b"simulate" in seen and b"3/3" in seen
    assert b"\x1b" not in output
    done = llep("simulate", "zipf:ratio=2", *SMALL)
    assert "\x1b" not in done.stdout + done.stderr


def test_a_broken_recording(tmp_path: Path) -> None:
    from llep.generate import Workload, generate_steps
    from llep.shapes import ModelShape
    from llep.traces import write_trace

    shape = ModelShape(name="small", layer_numbers=(0,), num_experts=16, top_k=2)
    steps = generate_steps(Workload(), shape, num_ranks=4, tokens_per_rank=100, steps=20)
    write_trace(tmp_path / "t", shape, 4, steps, part_rows=200)
    part = tmp_path / "t" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    done = llep("simulate", str(tmp_path / "t"))
    assert done.returncode == 1
    assert (
        "part-000001.parquet can't be read, truncated or not Parquet" in done.stderr and "--skip-broken" in done.stderr
    )
    assert "Traceback" not in done.stderr
    done = llep("simulate", str(tmp_path / "t"), "--skip-broken", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert f"left out {part}" in done.stderr
    assert 10 < json.loads(done.stdout)["steps"] < 20


USAGE_ERRORS: list[tuple[tuple[str, ...], str]] = [
    (("zipff:ratio=2",), "kind='zipff' is unknown"),
    (("zipf:ratio=99",), "ratio=99 can't be had: it must be below 4"),
    (("zipf:ratio=2", "--planner", "best"), "planner='best' is unknown"),
    (("zipf:ratio=2", "--model", "gpt-5"), "model='gpt-5' is unknown"),
    (("zipf:ratio=2", "--ranks", "0"), "num_ranks=0 is out of range"),
    (("zipf:ratio=2", "--ranks", "33"), "num_ranks=33 is out of range: it must be between 1 and 32"),
    (("zipf:ratio=2", "--slots-per-rank", "-1"), "slots_per_rank must be between 0"),
    (("zipf:ratio=2", "--cost-model", "abacus"), "cost model 'abacus' is neither a preset"),
    (("zipf:ratio=2", "--capacity-factor", "nan"), "capacity_factor must be a number >= 1, got nan"),
    (("zipf:ratio=2", "--imbalance-threshold", "0"), "imbalance_threshold must be a number >= 1, got 0"),
    (("zipf:ratio=2", "--phase", "lunch"), "phase='lunch' is unknown"),
    (("zipf:ratio=2", "--steps", "0"), "steps=0 is out of range"),
    (("zipf:ratio=2", "--layers", "0"), "layers must be between 1"),
    (("zipf:ratio=2", "--seed", "-1"), "seed must be >= 0, got -1"),
    (("zipf:ratio=2", "--tokens-per-rank", "-1"), "tokens_per_rank=-1 is out of range"),
    (("zipf:ratio=2", "--lend-scope", "rack"), "lend_scope must be one of any, node, got 'rack'"),
    (("zipf:ratio=2", "--chart", "/nowhere/chart.html"), "must be an .html file in a folder that is there"),
    (("zipf:ratio=2", "--chart", "chart.png"), "must be an .html file"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    done = llep("simulate", *SMALL, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_files_that_are_no_recordings(tmp_path: Path) -> None:
    done = llep("simulate", str(tmp_path / "none"))
    assert done.returncode == 1 and "does not exist: give the folder of a recording" in done.stderr
    (tmp_path / "file.parquet").write_text("no")
    done = llep("simulate", str(tmp_path / "file.parquet"))
    assert done.returncode == 1 and "truncated or not Parquet" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("no")
    done = llep("simulate", "balanced", *SMALL, "--save", str(tmp_path / "full"))
    assert done.returncode == 1 and "is not empty: give a recording a folder of its own" in done.stderr


@pytest.mark.parametrize("package", ["scipy", "pyarrow"])
def test_without_the_planning_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from llep.cli import main; main()"
    command = [sys.executable, "-c", code, "simulate", "balanced", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"this needs the package {package}" in done.stderr and "pip install 'llep[planning]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_of_this_needs_torch_vllm_or_ray() -> None:
    modules = "llep.simulate.chart, llep.traces, llep.generate, llep.planning.milp, llep.planning.question, llep.cost"
    code = f"import sys, {modules}; print([name for name in ('torch', 'vllm', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
