"""What is left behind of a request: a line of JSON, and a span where somebody collects them."""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import Running, start

from llep.views import DecisionView
from llep_server import through_ray, tracing
from llep_server.config import ServerConfig
from llep_server.logs import JsonFormatter
from llep_server.metrics import Exposition
from llep_server.scheduler import Scheduler
from llep_server.tracing import ENDPOINT_VARIABLE, from_env


def test_a_change_leaves_a_line_with_request_engine_and_revision(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    running.http.patch("/v1/settings", json={"watchdog_s": 30}, headers={"X-Request-Id": "abc-1"})
    record = next(record for record in caplog.records if record.name == "llep_server.middleware")
    line = json.loads(JsonFormatter().format(record))
    assert line["level"] == "info" and line["logger"] == "llep_server.middleware"
    assert (line["request_id"], line["author"]) == ("abc-1", "anonymous@127.0.0.1")
    assert (line["method"], line["path"], line["status"]) == ("PATCH", "/v1/settings", 200)
    assert (line["engine"], line["revision"]) == ("all", 1)


def test_an_exception_stays_one_line() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        record = logging.LogRecord("llep", logging.ERROR, __file__, 1, "it failed: %s", ("no",), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text and "RuntimeError: two" in json.loads(text)["exception"]


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes what an OpenTelemetry exporter sends."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def collecting() -> Iterator[tuple[str, list[bytes]]]:
    handler = type("Handler", (Collector,), {"bodies": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.bodies
        finally:
            server.shutdown()


def spans(bodies: list[bytes]) -> dict[str, dict[str, Any]]:
    """Attributes and trace of each span by its name."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    found = {}
    for body in bodies:
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                values = {item.key: item.value for item in span.attributes}
                attributes = {key: value.string_value or value.int_value for key, value in values.items()}
                found[span.name] = attributes | {"trace": span.trace_id.hex()}
    return found


def test_spans_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    trace = "0af7651916cd43dd8448eb211c80319c"
    with collecting() as (endpoint, bodies):
        monkeypatch.setenv(ENDPOINT_VARIABLE, endpoint)
        for running in start(ServerConfig(), tmp_path):
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            running.http.put("/v1/mode", json={"mode": "observe"}, headers=headers)
            running.http.get("/v1/settings")
    found = spans(bodies)
    assert list(found) == ["PUT /v1/mode"]
    span = found["PUT /v1/mode"]
    assert span["trace"] == trace
    assert (span["llep.author"], span["llep.revision"], span["llep.engine"]) == ("anonymous@127.0.0.1", 1, "all")
    assert span["http.response.status_code"] == 200


def test_spans_of_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

    def decision(number: int) -> DecisionView:
        return DecisionView(
            **{"id": number, "time_s": 1.7e9, "engine": "tiny", "kind": "placement", "outcome": "nothing"},
            **{"reason": f"because {number}", "expected_gain_ratio": None, "inputs": {}, "revision": None},
        )

    with collecting() as (endpoint, bodies):
        monkeypatch.setenv(ENDPOINT_VARIABLE, endpoint)
        told = from_env({ENDPOINT_VARIABLE: endpoint})
        assert told is not None
        told.decisions([decision(2), decision(1)])  # from before
        told.decisions([decision(3), decision(2), decision(1)])
        told.close()
    found = spans(bodies)
    assert list(found) == ["decision placement"]
    assert found["decision placement"]["llep.reason"] == "because 3"


def test_decisions_are_followed_past_an_answer_that_cant_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(tracing, "DECISIONS_EVERY_S", 0.01)
    failing = Failing()

    async def follow() -> None:
        to_nobody = from_env({ENDPOINT_VARIABLE: "http://127.0.0.1:9"})
        assert to_nobody is not None
        following = asyncio.create_task(to_nobody.follow(Scheduler(failing)))
        await asyncio.wait_for(failing.went_on.wait(), 10)
        following.cancel()
        to_nobody.close()

    asyncio.run(follow())


def test_metrics_go_through_ray_past_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through_ray, "EVERY_S", 0.01)
    failing = Failing()

    async def send() -> None:
        async with through_ray.sending(Exposition(Scheduler(failing), keep_s=0.0), failing):
            await asyncio.wait_for(failing.went_on.wait(), 10)

    asyncio.run(send())


class Failing:
    """A way to the scheduler on which something unforeseen happens."""

    def __init__(self) -> None:
        self.calls = 0
        self.went_on = asyncio.Event()

    async def call(self, method: str, **arguments: Any) -> Any:
        self.calls += 1
        if self.calls > 3:
            self.went_on.set()
        raise ZeroDivisionError


def test_no_endpoint_no_cost() -> None:
    program = (
        "import sys; from llep_server.app import create_app; from llep_server.config import ServerConfig; "
        "from llep_server.tracing import from_env; assert from_env({}) is None; "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
