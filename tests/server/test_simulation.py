"""What-if questions over HTTP: the same answers as `llep plan simulate`, beside the event loop, bounded."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from conftest import Llep
from running import Running
from test_http import error_of

from llep_server import simulation
from llep_server.work import Worker

QUESTION = {"tokens": [[4000, 96, 10, 10], [4000, 96, 10, 10]], "min_chunk_tokens": 64}


def ask(running: Running, body: Any) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return running.http.post("/v1/plans/simulate", content=content, headers=headers, timeout=90)


def test_answers_as_the_command_does(unchanged: Running, llep: Llep, tmp_path: Any) -> None:
    file = tmp_path / "question.json"
    file.write_text(json.dumps({**QUESTION, "cost_model": "h100"}))
    printed = json.loads(llep("plan", "simulate", str(file), "-o", "json").stdout)
    answer = ask(unchanged, {**QUESTION, "cost_model": "h100"}).json()
    assert {**answer["detail"], "plan_us": 0} == {**printed, "plan_us": 0}
    assert answer["before"] == printed["before"] and answer["after"] == printed["after"]
    assert answer["lends"] == len(printed["lends"]) > 0
    assert answer["lend_bytes"] == answer["lends"] * answer["peak_memory_bytes"]  # one lend to the one other rank
    assert answer["predicted_gain_s"] == pytest.approx(printed["predicted_gain_us"] / 1e6)


def test_without_a_cost_model_nothing_is_predicted(unchanged: Running) -> None:
    answer = ask(unchanged, {**QUESTION, "planner": "least_loaded"}).json()
    assert answer["predicted_gain_s"] is None and answer["planner"] == "least_loaded"
    assert answer["after"]["imbalance_ratio"] < answer["before"]["imbalance_ratio"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", "body"),
        (b"\xff", 400, "invalid_json", "body"),
        (b"[" * 50_000, 400, "invalid_json", "body"),
        (b"[" * 500_000, 400, "invalid_json", "body"),
        (b"[]", 422, "invalid_request", "body"),
        ({}, 422, "invalid_setting", "tokens"),
        ({"tokens": [[1, 2], [3]]}, 422, "invalid_setting", "tokens"),
        ({"tokens": [[1, -2]]}, 422, "invalid_setting", "tokens"),
        ({"tokens": [[2**62, 1]]}, 422, "invalid_setting", None),
        ({"tokens": [[2**31, 1], [1, 1]], "slots_per_rank": 1}, 422, "invalid_setting", "tokens"),
        ({"token": [[1]]}, 422, "invalid_setting", "token"),
        ({**QUESTION, "planner": "best"}, 422, "invalid_setting", "planner"),
        ({**QUESTION, "planner": ["quota"]}, 422, "invalid_setting", "planner"),
        ({**QUESTION, "cost_model": "/etc/passwd"}, 422, "invalid_setting", "cost_model"),
        ({**QUESTION, "capacity_factor": "high"}, 422, "invalid_setting", "capacity_factor"),
        ({**QUESTION, "bytes_per_expert": 10**400, "cost_model": "h100"}, 422, "invalid_setting", "bytes_per_expert"),
        ({**QUESTION, "bytes_per_expert": 10**400}, 422, "invalid_setting", "bytes_per_expert"),
        ({**QUESTION, "capacity_factor": 10**400}, 422, "invalid_request", "body"),
    ],
)
def test_bad_questions(unchanged: Running, body: Any, status: int, code: str, param: str | None) -> None:
    error = error_of(ask(unchanged, body), status, code)
    assert param is None or error["param"] == param


def test_sixteen_mebibytes_and_no_more(unchanged: Running) -> None:
    row = json.dumps([10**9] * 1000)  # few and long numbers, all alike: to read them is work enough, to plan is none
    fits = f'{{"tokens": [{", ".join([row] * 1000)}]}}'.encode()
    assert 11 << 20 < len(fits) <= 16 << 20
    slowest_s = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal slowest_s
        while not done.is_set():
            started_s = time.monotonic()
            assert unchanged.http.get("/livez").status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - started_s)
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    answer = ask(unchanged, fits)
    done.set()
    watching.join()
    assert answer.status_code in (200, 504), answer.text[:500]
    assert slowest_s < 2.0  # the loop never waits for it, however slow this machine is
    error_of(ask(unchanged, b" " * ((16 << 20) + 1)), 413, "body_too_large")


@pytest.mark.parametrize(("rows", "what"), [([[1] * 1_500_000], "1500000 experts"), ([[1]] * 4097, "4097 ranks")])
def test_what_no_model_has_is_refused_and_the_next_question_answered(
    unchanged: Running, rows: list[list[int]], what: str
) -> None:
    refused = ask(unchanged, {"tokens": rows})
    error = error_of(refused, 422, "invalid_setting")
    assert what in error["message"] and error["param"] == "tokens"
    assert ask(unchanged, QUESTION).status_code == 200


def test_what_takes_too_long_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(running, QUESTION).status_code == 200
    monkeypatch.setattr(simulation, "TIMEOUT_S", 0.2)
    large = {"tokens": [[7] * 60_000] * 20}
    error_of(ask(running, large), 504, "took_too_long")
    monkeypatch.undo()
    assert ask(running, QUESTION).status_code == 200  # by a new process


def test_too_many_at_once_are_told_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Worker = running.app.state.simulator._worker
    monkeypatch.setattr(worker, "_most_waiting", 1)
    answers: list[int] = []
    large = {"tokens": [[7] * 60_000] * 20}
    threads = [threading.Thread(target=lambda: answers.append(ask(running, large).status_code)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 503, 504} and 503 in answers and answers.count(503) < 5


def test_the_process_beside_ends_with_the_server(running: Running) -> None:
    assert ask(running, QUESTION).status_code == 200
    worker: Worker = running.app.state.simulator._worker
    process = worker._process
    assert process is not None and process.returncode is None
    running.await_(worker.close())
    assert process.returncode is not None
