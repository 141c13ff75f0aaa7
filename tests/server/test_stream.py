"""Server-sent events: one a second, resumed where a listener left off, and no listener is a burden to others."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from reporting import Engine
from running import Running, start
from test_http import error_of

from llep_server import stream
from llep_server.config import ServerConfig
from llep_server.operation_store import OperationStore
from llep_server.stream import Broadcast, Moment


@contextmanager
def listening(running: Running, query: str = "", **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a stream: {id, event, data}."""
    with httpx.Client(base_url=running.url, timeout=20, trust_env=False) as http:
        with http.stream("GET", f"/v1/loads/stream{query}", headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            yield events(response.iter_lines())


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    fields: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = json.loads(value) if name == "data" else value
        elif "event" in fields:
            yield fields
            fields = {}
        else:
            fields = {}


def calls(running: Running) -> int:
    return running.caller.calls.count("loads")


def test_loads_once_a_second_for_all(running: Running) -> None:
    engine = Engine()
    running.report(engine)
    engine.run()
    running.report(engine)
    running.report(Engine(name="other"))
    before = calls(running)
    started_s = time.monotonic()
    with listening(running) as one, listening(running, "?engine=tiny") as other:
        all_loads = [next(one) for _ in range(3)]
        of_tiny = [next(other) for _ in range(3)]
    assert [event["event"] for event in all_loads] == 3 * ["loads"]
    assert {loads["engine"] for loads in all_loads[0]["data"]["loads"]} == {"tiny", "other"}
    assert [loads["engine"] for loads in of_tiny[0]["data"]["loads"]] == ["tiny"]
    assert of_tiny[0]["data"]["loads"][0]["tokens"] == 1024
    seconds = time.monotonic() - started_s
    assert calls(running) - before <= seconds + 2  # not twice as many


def test_goes_on_after_the_last_event_seen(running: Running) -> None:
    with listening(running) as first:
        seen = [next(first)["id"] for _ in range(2)]
    time.sleep(2.5)
    with listening(running, **{"Last-Event-ID": seen[0]}) as again:
        resumed = [next(again)["id"] for _ in range(3)]
    run, number = seen[0].split("-")
    assert resumed == [f"{run}-{int(number) + more}" for more in (1, 2, 3)]


@pytest.mark.parametrize("last", ["1234-1", "nonsense", "-", "0"])
def test_an_event_that_is_not_known_is_said_to_be_missed(running: Running, last: str) -> None:
    with listening(running, **{"Last-Event-ID": last}) as listened:
        missed, loads = next(listened), next(listened)
    assert missed["event"] == "missed" and missed["data"]["last_event_id"] == last
    assert loads["event"] == "loads"


def test_says_when_the_scheduler_is_away_and_when_it_is_back(running: Running) -> None:
    with listening(running) as listened:
        assert next(listened)["event"] == "loads"
        running.caller.is_up = False
        kinds = [next(listened) for _ in range(3)]
        problem = next(event for event in kinds if event["event"] == "problem")
        assert problem["data"]["error"]["code"] == "scheduler_unreachable"
        running.caller.is_up = True
        assert "loads" in [next(listened)["event"] for _ in range(3)]


async def _of_another_version(**arguments: Any) -> list[dict[str, Any]]:
    return [{"engine": "tiny"}]


async def _that_fails(**arguments: Any) -> list[dict[str, Any]]:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("answer", "code"), [(_of_another_version, "scheduler_unreachable"), (_that_fails, "llep_error")]
)
def test_goes_on_after_an_answer_that_cant_be_read(
    running: Running, monkeypatch: pytest.MonkeyPatch, answer: Any, code: str
) -> None:
    with listening(running) as listened:
        assert next(listened)["event"] == "loads"
        monkeypatch.setattr(running.caller.scheduler, "loads", answer)
        problem = next(event for event in (next(listened) for _ in range(3)) if event["event"] == "problem")
        assert problem["data"]["error"]["code"] == code
        monkeypatch.undo()
        assert "loads" in [next(listened)["event"] for _ in range(3)]


def test_all_parts_are_closed_whatever_one_raises(tmp_path: Path) -> None:
    with contextmanager(start)(ServerConfig(), tmp_path / "state") as running:
        asked = running.http.post("/v1/plans/simulate", json={"tokens": [[4, 1], [4, 1]]}, timeout=90)
        assert asked.status_code == 200
        process = running.app.state.simulator._worker._process
        broadcast = _broadcast(running)

        async def fail() -> None:
            broadcast._making = asyncio.ensure_future(_that_fails())
            await asyncio.wait([broadcast._making])

        running.await_(fail())
        assert process.returncode is None
    assert process.returncode is not None
    operations = OperationStore(tmp_path / "state")
    operations.open()
    assert operations._held is not None
    operations.close()


def test_names_that_nobody_has_take_no_memory(running: Running) -> None:
    error_of(running.http.get("/v1/loads/stream?engine=nobody"), 404, "unknown_engine")
    moment = Moment(1, "a-1", 0.0, {"tiny": "{}"})
    texts = {moment.text(name) for name in (None, "tiny", *(f"nobody-{number}" for number in range(100)))}
    assert len(moment._texts) == 3 and len(texts) == 2
    away = Moment(2, "a-2", 0.0, problem={"message": "away", "code": "scheduler_unreachable"})
    assert away.text("tiny") == away.text("nobody") == away.text(None) and b"away" in away.text("tiny")
    running.caller.is_up = False
    with listening(running, "?engine=nobody") as listened:  # who can tell
        assert next(listened)["event"] == "problem"


def test_so_many_and_no_more(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_STREAMS", 2)
    with listening(running) as one, listening(running) as other:
        next(one), next(other)
        refused = running.http.get("/v1/loads/stream")
        assert error_of(refused, 503, "too_many_streams") and refused.headers["Retry-After"]
    deadline_s = time.monotonic() + 10
    while _broadcast(running).listeners:
        assert time.monotonic() < deadline_s, "listeners that left are still counted"
        time.sleep(0.1)


def test_who_does_not_read_is_dropped(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers between fill up, and from then on the listener has so many seconds to take something."""
    monkeypatch.setattr(stream, "TAKE_WITHIN_S", 0.5)
    monkeypatch.setattr(stream, "EVERY_S", 0.005)
    for index in range(20):
        running.report(Engine(name=f"engine-{index}", ep_size=8))
    host, port = running.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(f"GET /v1/loads/stream HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        deadline_s = time.monotonic() + 30
        while not (broadcast := _broadcast(running)).listeners and time.monotonic() < deadline_s:
            time.sleep(0.05)
        while broadcast.listeners and time.monotonic() < deadline_s:
            assert running.http.get("/livez").status_code == 200  # nobody else notices
            time.sleep(0.05)
        assert broadcast.listeners == 0


def test_the_scheduler_is_left_alone_when_nobody_listens(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "GO_ON_S", 0.5)
    with listening(running) as listened:
        next(listened)
    time.sleep(2.5)
    before = calls(running)
    time.sleep(1.5)
    assert calls(running) == before
    with listening(running) as listened:  # and again from the start
        fresh = next(listened)
    assert time.time() - fresh["data"]["time_s"] < 5


def _broadcast(running: Running) -> Broadcast:
    broadcast: Broadcast = running.app.state.broadcast
    return broadcast


def test_an_open_stream_does_not_hold_up_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    life = start(ServerConfig(), tmp_path / "state")
    with listening(next(life)) as found:
        assert next(found)["event"] == "loads"
        asked_s = time.monotonic()
        assert list(life) == []
        assert time.monotonic() - asked_s < 3
        with pytest.raises(httpx.RemoteProtocolError):
            list(found)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
