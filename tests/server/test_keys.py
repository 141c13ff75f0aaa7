"""Who may come in: keys, scopes, changes of the file, and nothing said that would help a stranger."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from running import Running, start
from test_http import error_of

from llep.errors import UnsupportedConfiguration
from llep_server.config import ServerConfig
from llep_server.keys import KeyRing, Scope, hash_key

READ_KEY = "reading-key-0123456789"
ADMIN_KEY = "admin-key-0123456789abc"
CONTENT = f"# who may come in\n\ngrafana read {READ_KEY}\nalice\tadmin   {hash_key(ADMIN_KEY)}\n"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def replace(path: Path, content: str) -> None:
    """As an editor or Kubernetes does: at one blow."""
    new = path.with_suffix(".new")
    new.write_text(content)
    os.replace(new, path)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(CONTENT)
    return path


@pytest.fixture
def guarded(tmp_path: Path, keys_file: Path) -> Iterator[Running]:
    yield from start(ServerConfig(keys_file=keys_file), tmp_path / "state")


def test_every_route_but_the_probes_needs_a_key(guarded: Running) -> None:
    open_paths = {"/livez", "/readyz", "/health", "/version"}
    paths = guarded.http.get("/openapi.json").json()["paths"]
    assert len(paths) >= 11
    for path, methods in paths.items():
        for method in methods:
            answer = guarded.http.request(method, path.replace("{engine}", "a"))
            if path in open_paths:
                assert answer.status_code in (200, 503)
                assert "security" not in methods[method]
            else:
                assert methods[method]["security"] == [{"HTTPBearer": []}]
                error_of(answer, 401, "invalid_key")
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Basic {READ_KEY}", f"Bearer {READ_KEY}x", f"Bearer {READ_KEY[:-1]}", "Bearer \xff"],
)
def test_wrong_keys(guarded: Running, header: str) -> None:
    response = guarded.http.get("/v1/engines", headers=[(b"Authorization", header.encode("latin-1"))])
    message = error_of(response, 401, "invalid_key")["message"]
    assert READ_KEY[:-1] not in message


def test_the_key_is_asked_for_before_anything_is_parsed(guarded: Running) -> None:
    error_of(guarded.http.patch("/v1/settings", content=b"{"), 401, "invalid_key")
    error_of(guarded.http.get("/v1/nothing"), 401, "invalid_key")
    error_of(guarded.http.get("/v1/loads?window_s=soon"), 401, "invalid_key")


def test_scopes(guarded: Running) -> None:
    reading, changing = bearer(READ_KEY), bearer(ADMIN_KEY)
    assert guarded.http.get("/v1/engines", headers=reading).status_code == 200
    assert guarded.http.get("/metrics", headers=reading).status_code == 200
    error = error_of(guarded.http.put("/v1/mode", json={"mode": "off"}, headers=reading), 403, "insufficient_scope")
    assert "'grafana'" in error["message"]
    error_of(guarded.http.patch("/v1/settings?dry_run=1", json={}, headers=reading), 403, "insufficient_scope")
    assert guarded.http.get("/v1/settings", headers=reading).json()["revision"] == 0
    assert guarded.http.put("/v1/mode", json={"mode": "off"}, headers=changing).status_code == 200
    event = next(e for e in guarded.http.get("/v1/events", headers=reading).json()["data"] if e["kind"] == "mode")
    assert event["author"] == "alice@127.0.0.1"


def test_a_forwarded_address_is_not_believed(guarded: Running) -> None:
    headers = bearer(ADMIN_KEY) | {"X-Forwarded-For": "203.0.113.9"}
    guarded.http.put("/v1/mode", json={"mode": "off"}, headers=headers)
    event = next(e for e in guarded.http.get("/v1/events", headers=headers).json()["data"] if e["kind"] == "mode")
    assert event["author"] == "alice@127.0.0.1"


def test_the_file_is_read_again_when_it_changes(guarded: Running, keys_file: Path) -> None:
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 200
    replace(keys_file, "bob read another-key-0123456789\n")
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 401
    assert guarded.http.get("/v1/engines", headers=bearer("another-key-0123456789")).status_code == 200


def test_a_stream_ends_with_its_key(guarded: Running, keys_file: Path) -> None:
    with guarded.http.stream("GET", "/v1/loads/stream", headers=bearer(READ_KEY)) as response:
        lines = response.iter_lines()
        next(lines)
        replace(keys_file, "bob read another-key-0123456789\n")
        started_s = time.monotonic()
        with suppress(httpx.RemoteProtocolError):  # it breaks off
            for _ in lines:
                assert time.monotonic() - started_s < 10


@pytest.mark.parametrize("content", [None, "", "bob\n", "bob root another-key-0123456789\n"])
def test_a_broken_change_leaves_the_keys_and_is_seen(guarded: Running, keys_file: Path, content: str | None) -> None:
    if content is None:
        keys_file.unlink()
    else:
        replace(keys_file, content)
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 200
    health = guarded.http.get("/health").json()
    assert health["status"] == "degraded" and str(keys_file) in health["keys"]
    replace(keys_file, CONTENT)
    assert guarded.http.get("/v1/engines", headers=bearer(READ_KEY)).status_code == 200
    assert guarded.http.get("/health").json()["keys"] == "ok"


def test_no_key_is_ever_logged_or_answered(guarded: Running, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    stranger = "stranger-key-0123456789"
    texts = []
    for key in (READ_KEY, ADMIN_KEY, stranger):
        for method, path in (("GET", "/v1/events"), ("PATCH", "/v1/settings"), ("GET", "/health"), ("GET", "/metrics")):
            texts.append(guarded.http.request(method, path, headers=bearer(key)).text)
    replace(keys_file, CONTENT + f"bob read {stranger}\nbroken {stranger}\n")
    texts.append(guarded.http.get("/v1/engines", headers=bearer(stranger)).text)
    texts.append(guarded.http.get("/health").text)
    assert "keys in force stay as they were" in caplog.text
    for text in (*texts, caplog.text, repr(KeyRing.__init__), repr(vars(guarded))):
        for secret in (READ_KEY, ADMIN_KEY, stranger, hash_key(ADMIN_KEY)):
            assert secret not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no key"),
        ("# nobody\n", "holds no key"),
        ("alice admin\n", "line 1: has 2 fields"),
        ("\nalice root 0123456789abcdef\n", "line 2: the scope of 'alice' must be read or admin"),
        ("al!ce read 0123456789abcdef\n", "line 1: the name must be"),
        ("alice read short\n", "at least 16 characters"),
        ("alice read schlüsselschlüssel\n", "line 1: the key of 'alice' must be ASCII"),
        ("alice read sha256:abc\n", "64 lower-case hex digits"),
        ("alice read 0123456789abcdef\nalice admin 0123456789abcdeg\n", "names 'alice' twice"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UnsupportedConfiguration) as caught:
        KeyRing(path)
    assert words in caught.value.message and str(path) in caught.value.message
    assert "0123456789abcde" not in caught.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfiguration, match="can't be read: No such file"):
        KeyRing(tmp_path / "none")
    with pytest.raises(UnsupportedConfiguration, match="can't be read: Is a directory"):
        KeyRing(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnsupportedConfiguration, match="not UTF-8"):
        KeyRing(tmp_path / "binary")


def test_a_key_is_found_with_its_scope(keys_file: Path) -> None:
    ring = KeyRing(keys_file)
    reader, admin = ring.find(READ_KEY), ring.find(ADMIN_KEY)
    assert reader is not None and reader.may(Scope.READ) and not reader.may(Scope.ADMIN)
    assert admin is not None and admin.may(Scope.READ) and admin.may(Scope.ADMIN)
    assert ring.find(hash_key(ADMIN_KEY)) is None  # knowing the file's hash is not knowing the key
    assert ring.find("") is None
