"""`llep bench` before an API that lists its model and then says nothing more: it ends, and the mode is back."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import LLEP, Llep
from running import Running

pytest.importorskip("vllm")

ERROR = 1


class Silent(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = json.dumps({"data": [{"id": "m", "root": "/nowhere/m"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def mode(running: Running) -> str:
    settings = running.http.get("/v1/settings", params={"engine": "tiny"}).json()["settings"]
    return str(next(one["value"] for one in settings if one["key"] == "mode"))


def test_a_run_that_takes_too_long(busy: Running, llep: Llep, api: str) -> None:
    done = llep("bench", "--run-timeout", "1s", "--server", busy.url, "--", "--base-url", api)
    assert done.returncode == ERROR and "Traceback" not in done.stderr, done.stderr
    for words in ("engine tiny, API " + api, "--num-prompts 50", "longer than 1 s", "--run-timeout"):
        assert words in done.stderr
    assert mode(busy) == "active"


def test_a_run_that_fails_says_why(busy: Running, llep: Llep, api: str) -> None:
    done = llep("bench", "--server", busy.url, "--", "--base-url", api, "--no-such-flag")
    assert done.returncode == ERROR
    assert "vllm bench serve ended with status 2" in done.stderr and "no-such-flag" in done.stderr
    assert mode(busy) == "active"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(busy: Running, environ: dict[str, str], api: str, number: int) -> None:
    command = [LLEP, "bench", "--off", "observe", "--server", busy.url, "--", "--base-url", api]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline_s = time.monotonic() + 60
            while mode(busy) != "observe":
                assert process.poll() is None and time.monotonic() < deadline_s
                time.sleep(0.1)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode not in (0, -signal.SIGTERM) and "Traceback" not in said
    assert mode(busy) == "active"
    assert subprocess.run(["pgrep", "-f", f"llep.vllm_plugin.bench.*{api}"]).returncode == 1


def test_an_api_that_is_not_there(busy: Running, llep: Llep) -> None:
    done = llep("bench", "--server", busy.url, "--", "--base-url", "http://127.0.0.1:1")
    assert done.returncode == ERROR and "no API at http://127.0.0.1:1" in done.stderr
    assert busy.http.get("/v1/settings").json()["revision"] == 0  # nothing was touched
