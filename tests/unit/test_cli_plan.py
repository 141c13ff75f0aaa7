"""`llep plan simulate`, the real command: the documented JSON form, and errors by name with exit code 2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llep.errors import SettingsError
from llep.planning.question import answer, parse_question
from tests.unit.commands import run_llep

SKEWED = {
    "tokens": [[900, 100, 0, 0], [900, 100, 0, 0]],
    "slots_per_rank": 1,
    "min_chunk_tokens": 1,
    "cost_model": None,
}


def llep(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_llep(*arguments, stdin=stdin, timeout_s=120)


def ask(question: Any, planner: str = "quota") -> dict[str, Any]:
    """The answer without the command around it, which costs a second each time."""
    return answer(parse_question(question), planner)


def test_the_documented_form(tmp_path: Path) -> None:
    file = tmp_path / "question.json"
    file.write_text(json.dumps({**SKEWED, "bytes_per_expert": 1000}))
    done = llep("plan", "simulate", str(file), "-o", "json", "--planner", "quota")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [
        *("planner", "decision", "before", "after", "segments", "lends", "lend_bytes", "plan_us", "predicted_gain_us")
    ]
    assert found["planner"] == "quota" and found["decision"] == "lend"
    assert found["before"] == {"imbalance_ratio": 2.0, "rank_loads": [2000, 0]}
    assert list(found["after"]) == ["imbalance_ratio", "rank_loads"]
    assert found["after"]["imbalance_ratio"] <= 1.02
    assert sum(found["after"]["rank_loads"]) == 2000
    assert found["lends"] == [{"expert": 0, "src_rank": 0, "dst_rank": 1, "tokens": found["after"]["rank_loads"][1]}]
    assert found["lend_bytes"] == 1000
    for segment in found["segments"]:
        assert list(segment) == ["expert", "rank", "start", "stop"]
    covered = sorted((s["start"], s["stop"]) for s in found["segments"] if s["expert"] == 0)
    assert covered[0][0] == 0 and covered[-1][1] == 1800
    assert all(stop == start for (_, stop), (start, _) in zip(covered, covered[1:], strict=False))
    assert found["plan_us"] > 0
    assert found["predicted_gain_us"] == 0


def test_standard_input() -> None:
    done = llep("plan", "simulate", "-", "-o", "json", "--planner", "least_loaded", stdin=json.dumps(SKEWED))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {**found, "plan_us": 0} == {**ask(SKEWED, "least_loaded"), "plan_us": 0}


@pytest.mark.parametrize("planner", ["quota", "least_loaded", "home"])
def test_every_planner_answers(planner: str) -> None:
    found = ask(SKEWED, planner)
    assert found["planner"] == planner
    assert found["decision"] == ("off" if planner == "home" else "lend")
    assert max(found["after"]["rank_loads"]) <= (2000 if planner == "home" else 1020)


def test_every_key_counts() -> None:
    full = {
        "tokens": [[800, 100, 50, 50], [800, 100, 50, 50], [0, 0, 0, 0], [0, 0, 0, 0]],
        "home_rank": [3, 2, 1, 0],
        "slots_per_rank": [1, 1, 1, 0],
        "bytes_per_expert": 1000,
        "free_bytes": [5000, 5000, 5000, 5000],
        "ranks_per_node": 2,
        "min_chunk_tokens": 1,
        "capacity_factor": 1.0,
        "imbalance_threshold": 1.0,
        "cost_model": None,
    }
    plain = ask(full)
    assert plain["before"]["rank_loads"] == [100, 100, 200, 1600]
    assert {lend["src_rank"] for lend in plain["lends"]} == {3}
    assert len(plain["lends"]) == 3 and plain["lend_bytes"] == 3000

    assert ask({**full, "slots_per_rank": 0})["decision"] == "no_slot"
    assert ask({**full, "free_bytes": [999, 999, 999, 999]})["decision"] == "memory"
    assert {lend["dst_rank"] for lend in ask({**full, "free_bytes": [999, 999, 1000, 0]})["lends"]} == {2}
    assert ask({**full, "imbalance_threshold": 4.0})["decision"] == "balanced"
    assert ask({**full, "min_chunk_tokens": 5000})["lends"] == []
    assert max(ask({**full, "capacity_factor": 2.0})["after"]["rank_loads"]) > max(plain["after"]["rank_loads"])
    assert ask({**full, "home_rank": None})["before"]["rank_loads"] == [1600, 200, 100, 100]


def test_null_and_left_out_are_the_same() -> None:
    keys = ("home_rank", "bytes_per_expert", "free_bytes", "ranks_per_node", "min_chunk_tokens", "capacity_factor")
    question = {"tokens": [[5000, 100, 0, 0], [5000, 100, 0, 0]], "slots_per_rank": 2}
    first, second = ask(question), ask({**question, **dict.fromkeys([*keys, "imbalance_threshold", "cost_model"])})
    assert {**first, "plan_us": 0} == {**second, "plan_us": 0}


def test_the_cost_model_is_a_gate() -> None:
    small = {"tokens": [[40, 0], [40, 0]], "slots_per_rank": 1, "min_chunk_tokens": 1, "bytes_per_expert": 50_000_000}
    assert ask(small)["decision"] == "lend"
    gated = ask({**small, "cost_model": "h100"})
    assert gated["decision"] == "no_gain" and gated["lends"] == [] and gated["predicted_gain_us"] == 0
    large = ask({**small, "tokens": [[400_000, 0], [400_000, 0]], "cost_model": "h100"})
    assert large["decision"] == "lend" and large["predicted_gain_us"] > 0


def test_a_table_for_people() -> None:
    done = llep("plan", "simulate", "-", stdin=json.dumps(SKEWED))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("quota: lend")
    assert "2,000" in done.stdout and "max / mean" in done.stdout


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([1], "a question is a JSON object with the keys tokens"),
        ({}, "tokens is missing"),
        ({"tokens": []}, "tokens must be a list with one list per rank, at least 1"),
        ({"tokens": 3}, "tokens must be a list with one list per rank"),
        ({"tokens": [[]]}, "the same number of experts for each rank, at least 1"),
        ({"tokens": [[1, 2], [3]]}, "rank 0 has 2, rank 1 has 1"),
        ({"tokens": [[1, -2], [3, 4]]}, "tokens[0][1] must be an integer >= 0, got -2"),
        ({"tokens": [[1, 2.5], [3, 4]]}, "tokens[0][1] must be an integer >= 0, got 2.5"),
        ({"tokens": [[1, True], [3, 4]]}, "tokens[0][1] must be an integer >= 0, got True"),
        ({"tokens": [[1, "2"], [3, 4]]}, "tokens[0][1] must be an integer >= 0, got '2'"),
        ({"tokens": [[1, 10**30], [3, 4]]}, "tokens[0][1] must be an integer >= 0"),
        ({"tokens": [[1, 2**31], [3, 4]]}, "tokens: counts must be in 0..2147483647, got 2147483648 from rank 0"),
        ({"tokens": [[0, 0], [0, 0]]}, "tokens holds 0 tokens"),
        ({"home_rank": [0]}, "expert 1 is without a home"),
        ({"home_rank": [0, None]}, "expert 1 is without a home"),
        ({"home_rank": [0, 1, 1]}, "home_rank has 3 entries, tokens has 2 experts"),
        ({"home_rank": [0, 2]}, "home_rank must be a rank in 0..1, got 2 for expert 1"),
        ({"home_rank": [0, -1]}, "home_rank[1] must be an integer >= 0, got -1"),
        ({"home_rank": 1}, "home_rank must be a list of ranks"),
        ({"slots_per_rank": 3}, "slots_per_rank must be at most the number of experts, 2, got 3"),
        ({"slots_per_rank": -1}, "slots_per_rank must be an integer >= 0, got -1"),
        ({"slots_per_rank": [1]}, "slots_per_rank must be one number, or one for each of 2 ranks: got 1"),
        ({"slots_per_rank": [1, 1.5]}, "slots_per_rank[1] must be an integer >= 0, got 1.5"),
        ({"bytes_per_expert": -1}, "bytes_per_expert must be an integer >= 0, got -1"),
        ({"free_bytes": [1, 1]}, "give bytes_per_expert"),
        ({"free_bytes": [1], "bytes_per_expert": 1}, "free_bytes must be a list with one entry for each of 2 ranks"),
        ({"free_bytes": [1, -1], "bytes_per_expert": 1}, "free_bytes[1] must be an integer >= 0, got -1"),
        ({"ranks_per_node": 0}, "ranks_per_node must be an integer >= 1, got 0"),
        ({"min_chunk_tokens": 0}, "min_chunk_tokens must be an integer >= 1, got 0"),
        ({"min_chunk_tokens": 1.5}, "min_chunk_tokens must be an integer >= 1, got 1.5"),
        ({"capacity_factor": 0.5}, "capacity_factor must be a number >= 1, got 0.5"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be a number >= 1, got nan"),
        ({"capacity_factor": "1"}, "capacity_factor must be a number, got '1'"),
        ({"imbalance_threshold": float("inf")}, "imbalance_threshold must be a number >= 1, got inf"),
        ({"cost_model": "h1000"}, "cost model 'h1000' is neither a preset"),
        ({"cost_model": 5}, "cost_model must be a name or null, got 5"),
        ({"slots": 5}, "unknown key 'slots'; did you mean 'slots_per_rank'?"),
    ],
)
def test_bad_questions(question: Any, message: str) -> None:
    whole = {"tokens": [[1, 2], [3, 4]], **question} if isinstance(question, dict) and question else question
    with pytest.raises(SettingsError) as caught:
        parse_question(whole)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stdin", "arguments", "message"),
    [
        ('{"tokens": [[1, -2]]}', (), "tokens[0][1] must be an integer >= 0, got -2"),
        ('{"tokens": [[1, 2]]', (), "standard input is not JSON"),
        ('{"tokens": [[NaN]]}', (), "got nan"),
        (json.dumps(SKEWED), ("--planner", "best"), "planner='best' is unknown; choose one of quota"),
        ("[" * 100_000, (), "standard input is not JSON"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(stdin: str, arguments: tuple[str, ...], message: str) -> None:
    done = llep("plan", "simulate", "-", "-o", "json", *arguments, stdin=stdin)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_cost_model_with_nan_is_refused(tmp_path: Path) -> None:
    from llep.cost import PRESETS

    PRESETS["h100"].dump(tmp_path / "good.yaml")
    text = (tmp_path / "good.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(
        "\n".join("plan_s: .nan" if line.startswith("plan_s") else line for line in text.splitlines())
    )
    question = {**SKEWED, "cost_model": str(tmp_path / "bad.yaml")}
    done = llep("plan", "simulate", "-", stdin=json.dumps(question))
    assert done.returncode == 2 and "plan_s must be a number of seconds >= 0, got nan" in done.stderr
    assert ask({**SKEWED, "cost_model": str(tmp_path / "good.yaml")})["decision"] in ("lend", "no_gain")


def test_a_missing_file(tmp_path: Path) -> None:
    done = llep("plan", "simulate", str(tmp_path / "none.json"))
    assert done.returncode == 2 and "none.json can't be read: No such file or directory" in done.stderr


def test_place(tmp_path: Path) -> None:
    import numpy as np

    from llep.generate import Workload, generate_steps
    from llep.shapes import ModelShape
    from llep.traces import TraceWriter

    shape = ModelShape(name="small", layer_numbers=(3, 4), num_experts=16, top_k=2)
    with TraceWriter(tmp_path / "t", shape, 4) as writer:
        for step in generate_steps(Workload(kind="zipf", ratio=2.0), shape, num_ranks=4, tokens_per_rank=100, steps=5):
            writer.append(step)
        writer.append_transitions(4, np.full((1, 16, 16), 3))
    done = llep("plan", "place", str(tmp_path / "t"), "--ranks-per-node", "2", "--time-limit", "5", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [layer["layer"] for layer in found["layers"]] == [3, 4]
    assert all(sorted(layer["home_rank"]) == sorted(list(range(4)) * 4) for layer in found["layers"])
    assert found["after"]["imbalance_ratio"] < found["before"]["imbalance_ratio"]
    assert found["before"]["other_rank_share"] == pytest.approx(0.75)
    assert "to other ranks: 0.750 -> 0." in llep("plan", "place", str(tmp_path / "t"), "--time-limit", "0").stdout
    wrong = llep("plan", "place", str(tmp_path / "t"), "--ranks", "17")
    assert wrong.returncode == 2 and "ep_size must be between 1 and the number of experts, 16, got 17" in wrong.stderr
