"""`llep demo load` against a small HTTP server that answers as vLLM's API does and notes what it was asked."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llep.cli.demo import LoadPlan
from llep.training.text import Domain
from tests.unit.commands import run_llep

COMMAND = [sys.executable, "-c", "from llep.cli import main; main()", "demo", "load"]


class Api:
    """The requests it got; `status` is what it answers, after `delay_s`; which models there are after `models_s`."""

    def __init__(self, status: int = 200, delay_s: float = 0.0, models_s: float = 0.0) -> None:
        self.status, self.delay_s, self.models_s = status, delay_s, models_s
        self.asked = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.url = ""


@contextmanager
def serving(api: Api) -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.asked.set()
            time.sleep(api.models_s)
            self._answer(200, {"data": [{"id": "the-model"}]})

        def do_POST(self) -> None:
            api.keys.add(self.headers.get("Authorization"))
            api.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(api.delay_s)
            self._answer(api.status, {"usage": {"prompt_tokens": 10, "completion_tokens": 2}})

        def _answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked has gone
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        api.url = f"http://127.0.0.1:{server.server_port}"
        yield api
        server.shutdown()
        thread.join()


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two domains, of which each character says which."""
    rng = random.Random(0)
    (tmp_path / "vowels").write_text("".join(rng.choices("aeiou", k=50_000)))
    (tmp_path / "digits").write_text("".join(rng.choices("01234", k=50_000)))
    return ["--text", str(tmp_path / "vowels"), "--text", str(tmp_path / "digits")]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run_llep("demo", "load", *arguments, env=env, timeout_s=60)


def test_it_sends_prompts_of_shifting_domains_and_stops(texts: list[str]) -> None:
    with serving(Api()) as api:
        done = run(*texts, "--api", api.url, "--rate", "20", "--duration", "2s", "--period", "1s", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answered"] == found["sent"] == len(api.requests) > 5
    assert found["tokens"] == 12 * found["answered"] and found["failed"] == found["left_out"] == 0
    assert {request["model"] for request in api.requests} == {"the-model"}
    kinds = [set(request["prompt"]) <= set("aeiou") for request in api.requests]
    assert kinds[0] and not all(kinds), "the first domain comes first, the other one later"
    assert all(len(request["prompt"]) == 800 and request["max_tokens"] == 16 for request in api.requests)
    assert "llep: 0 of 2 s: vowels" in done.stderr


def test_a_slow_engine_is_not_flooded(texts: list[str]) -> None:
    with serving(Api(delay_s=1.0)) as api:
        done = run(*texts, "--api", api.url, "--rate", "50", "--duration", "1s", "--most-in-flight", "2", "-o", "json")
    found = json.loads(done.stdout)
    assert found["left_out"] > 5 and 2 <= found["sent"] == found["answered"] < 10


def test_the_key_is_sent_and_failures_are_said(texts: list[str]) -> None:
    with serving(Api(status=500)) as api:
        done = run(*texts, "--api", api.url, "--rate", "5", "--duration", "1s", env={"VLLM_API_KEY": "secret"})
    assert api.keys == {"Bearer secret"}
    assert done.returncode == 1
    assert "none of" in done.stderr and "HTTP 500" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_it(texts: list[str]) -> None:
    with serving(Api()) as api:
        options = [*texts, "--api", api.url, "--duration", "1h", "-o", "json"]
        with subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, text=True) as process:
            while not api.requests:
                time.sleep(0.05)
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=30)
    assert process.returncode in (0, 1) and json.loads(said)["sent"] >= 1


@pytest.mark.parametrize(
    ("api", "waits_for"),
    [(Api(models_s=8.0), "the models"), (Api(delay_s=8.0), "the last answers")],
    ids=["models", "last"],
)
def test_ctrl_c_ends_it_wherever_it_waits(api: Api, waits_for: str, texts: list[str]) -> None:
    with serving(api):
        options = [*texts, "--api", api.url, "--duration", "0.5s", "-o", "json"]
        with subprocess.Popen([*COMMAND, *options], stderr=subprocess.PIPE, text=True) as process:
            assert api.asked.wait(30)
            time.sleep(1.5)
            start_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
            assert time.monotonic() - start_s < 4, f"it waited for {waits_for}"
    assert process.returncode == 1 and "answered (it was ended before)" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--api", "http://127.0.0.1:9"], 3, "no API at http://127.0.0.1:9 .*llep serve.*--api"),
        (["--api", "nonsense"], 2, "--api 'nonsense' is not a URL"),
        (["--rate", "0"], 2, "--rate 0 .*at least 0.01"),
        (["--rate", "nan"], 2, "--rate nan "),
        (["--duration", "soon"], 2, "--duration 'soon' is not a duration"),
        (["--period", "0"], 2, "--period 0 .*more than 0"),
        (["--text", "/nowhere"], 2, "--text /nowhere does not exist"),
    ],
)
def test_mistakes_are_told(arguments: list[str], code: int, message: str, texts: list[str]) -> None:
    done = run(*(texts if "--text" not in arguments else []), *arguments)
    assert done.returncode == code
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_the_next_domain_takes_over_gradually() -> None:
    domains = [Domain(name, (name * 100,), ()) for name in "abc"]
    plan = LoadPlan(domains, 1.0, 100.0, 10.0, 5, 1, 1, 0)
    rng = random.Random(0)

    def share(elapsed_s: float, name: str) -> float:
        return sum(plan.prompt(elapsed_s, rng) == (name, name * 5) for _ in range(1000)) / 1000

    assert share(0.0, "a") == share(4.9, "a") == share(10.0, "b") == share(24.0, "c") == share(31.0, "a") == 1.0
    assert share(7.5, "a") == pytest.approx(0.5, abs=0.07)
    assert share(9.5, "b") == pytest.approx(0.9, abs=0.05)
