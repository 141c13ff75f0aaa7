"""What keeps strangers and nuisances out: failed keys, foreign pages, endless headers; and what every answer says."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running, start
from test_http import error_of
from test_keys import ADMIN_KEY, CONTENT, READ_KEY, bearer

from llep.config import Settings, is_hot
from llep_server import connections
from llep_server.config import ServerConfig
from llep_server.failures import EVERY_S, MOST_ADDRESSES, MOST_FAILURES, Failures
from llep_server.middleware import SECURITY_HEADERS


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Running]:
    keys_file = tmp_path / "keys"
    keys_file.write_text(CONTENT)
    yield from start(ServerConfig(keys_file=keys_file), tmp_path / "state")


def test_too_many_wrong_keys_have_to_wait(guarded: Running) -> None:
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 200
    statuses = [
        guarded.http.get("/v1/engines", headers=bearer(f"wrong-key-{number:016}")).status_code
        for number in range(MOST_FAILURES + 3)
    ]
    assert statuses == MOST_FAILURES * [401] + 3 * [429]
    refused = guarded.http.get("/v1/engines", headers=bearer("wrong-key-0123456789"))
    error = error_of(refused, 429, "too_many_failures")
    assert "wrong-key" not in refused.text and error["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["Retry-After"]) <= EVERY_S
    # Who was in before stays in; a key that has not been used from here must wait like a guess.
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 200
    error_of(guarded.http.get("/v1/engines", headers=bearer(ADMIN_KEY)), 429, "too_many_failures")
    assert guarded.http.get("/livez", headers=bearer("wrong-key-0123456789")).status_code == 200


def test_a_missing_key_is_no_failure(guarded: Running) -> None:
    for _ in range(MOST_FAILURES + 3):
        error_of(guarded.http.get("/v1/engines"), 401, "invalid_key")
    assert guarded.http.get("/v1/engines", headers=bearer(ADMIN_KEY)).status_code == 200


def test_failures_drip_away_and_take_bounded_memory() -> None:
    now_s = 0.0
    failures = Failures(lambda: now_s)
    for _ in range(MOST_FAILURES):
        assert failures.wait_s("192.0.2.1", None) == 0
        failures.failed("192.0.2.1")
    assert failures.wait_s("192.0.2.1", None) == pytest.approx(EVERY_S)
    assert failures.wait_s("192.0.2.2", None) == 0
    now_s = EVERY_S
    assert failures.wait_s("192.0.2.1", None) == 0
    failures.failed("192.0.2.1")
    assert failures.wait_s("192.0.2.1", None) > 0
    for number in range(2 * MOST_ADDRESSES):
        failures.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(failures) == MOST_ADDRESSES


def test_one_customer_has_many_ipv6_addresses() -> None:
    failures = Failures(lambda: 0.0)
    for number in range(MOST_FAILURES):
        failures.failed(f"2001:db8:0:1::{number:x}")
    assert failures.wait_s("2001:db8:0:1:ffff::1", None) > 0
    assert failures.wait_s("2001:db8:0:2::1", None) == 0
    for _ in range(MOST_FAILURES):
        failures.failed("::ffff:192.0.2.7")
    assert failures.wait_s("192.0.2.7", None) > 0


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_another_sites_page_changes_nothing(unchanged: Running, origin: str) -> None:
    """A form or a script elsewhere can reach loopback in the browser of somebody who may change things."""
    for method, path in (("POST", "/v1/placement/suggest"), ("PUT", "/v1/mode"), ("DELETE", "/v1/operations/1")):
        answer = unchanged.http.request(method, path, headers={"Origin": origin}, json={"mode": "off"})
        error_of(answer, 403, "foreign_origin")
    assert unchanged.http.get("/v1/settings", headers={"Origin": origin}).status_code == 200


def test_the_own_page_may_change_things(running: Running) -> None:
    answer = running.http.put("/v1/mode", headers={"Origin": running.url}, json={"mode": "observe"})
    assert answer.status_code == 200


def test_no_other_site_may_read_answers(unchanged: Running) -> None:
    for path in ("/v1/settings", "/metrics", "/livez", "/v1/nothing"):
        answer = unchanged.http.get(path, headers={"Origin": "https://evil.example"})
        assert not any(name.startswith("access-control") for name in answer.headers)
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers[name] == value
    preflight = unchanged.http.options("/v1/settings", headers={"Access-Control-Request-Method": "PATCH"})
    error_of(preflight, 405, "method_not_allowed")


def test_no_hot_setting_can_name_a_path_or_code() -> None:
    """What people can change over HTTP is a number, a switch or a word of a closed set; layers has its own grammar."""
    schema = Settings.model_json_schema()
    for key, rule in schema["properties"].items():
        if is_hot(key) and key != "layers":
            named = schema["$defs"].get(rule.get("$ref", "").rpartition("/")[2], rule)
            assert named["type"] in ("integer", "number", "boolean") or "enum" in named, key
    with pytest.raises(ValueError, match="neither 'all' nor a layer number"):
        Settings.parse({"layers": "/etc/passwd"})


@pytest.mark.parametrize("key", ["record_dir", "cost_model"])
def test_paths_are_not_taken_over_http(unchanged: Running, key: str) -> None:
    if key in Settings.model_fields:
        answer = unchanged.http.patch("/v1/settings", json={key: "/etc"})
        assert "can't change while serving" in error_of(answer, 422, "invalid_setting")["message"]


def _closed_after_s(running: Running, sent: bytes, more: bytes = b"") -> float:
    host, port = running.url.removeprefix("http://").split(":")
    started_s = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(sent)
        try:
            while more:
                client.sendall(more)
                assert time.monotonic() - started_s < 15
            while client.recv(4096):
                pass
        except OSError:
            pass
    return time.monotonic() - started_s


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_headers_that_never_end_are_given_up(running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections.BoundedProtocol, "max_header_s", 0.5)
    assert 0.3 < _closed_after_s(running, sent) < 10
    assert running.http.get("/livez").status_code == 200


def test_endless_headers_are_cut_off(running: Running) -> None:
    line = b"X-Long: " + 8000 * b"x" + b"\r\n"
    assert _closed_after_s(running, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n", more=line) < 5
    assert running.http.get("/livez").status_code == 200


def test_bad_json_never_reaches_a_log_as_a_secret(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    answer = guarded.http.patch(
        "/v1/settings",
        content=json.dumps({"mode": READ_KEY}),
        headers=bearer(ADMIN_KEY) | {"Authorization": f"Bearer {ADMIN_KEY}"},
    )
    assert answer.status_code == 415
    assert ADMIN_KEY not in caplog.text
