"""`llep control-plane` as a process: how it starts, what it refuses, how it ends. There is no Ray here."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import LLEP, Llep

from llep.errors import UnsupportedConfiguration
from llep_server.config import ServerConfig, is_loopback

READY = re.compile(r"llep control plane at (\S+), its docs at \S+/docs \((.+)\)")
NO_RAY = "127.0.0.1:1"


@contextmanager
def control_plane(environ: dict[str, str], *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(process, url, lines it logs) of one that runs; killed if it does not end by itself."""
    command = [LLEP, "control-plane", "--port", "0", "--ray-address", NO_RAY, *flags]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        log: list[str] = []
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        reader.start()
        try:
            line = process.stdout.readline()
            found = READY.match(line)
            assert found, (line, log)
            yield process, found[1], log
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=20)
            reader.join(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_without_a_scheduler_and_ends_in_good_order(environ: dict[str, str], number: int) -> None:
    with control_plane(environ) as (process, url, log):
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            assert http.get("/livez").status_code == 200
            body = http.get("/v1/engines").json()
            assert body["error"]["code"] == "scheduler_unreachable"
            assert NO_RAY in body["error"]["message"] and "LLEP_RAY_ADDRESS" in body["error"]["message"]
            assert http.get("/readyz").status_code == 503
            assert "llep_scheduler_up 0\n" in http.get("/metrics").text
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    assert "Traceback" not in "".join(log)


def test_the_process_imports_neither_ray_nor_torch(environ: dict[str, str]) -> None:
    with control_plane(environ) as (process, url, _):
        httpx.get(url + "/metrics", trust_env=False, timeout=20)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "msgspec" in maps  # this is where its libraries are seen
        assert "/ray/" not in maps and "/torch/" not in maps


def test_a_port_in_use(environ: dict[str, str], llep: Llep) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = llep("control-plane", "--port", str(port), "--ray-address", NO_RAY)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        f"llep: port {port} on 127.0.0.1 is in use: stop what listens there, or choose another with --port or "
        "LLEP_SERVER_PORT (0 takes a free one)"
    ]


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (["--host", "0.0.0.0"], {}, "name a keys file with --keys-file"),
        (["--host", "192.0.2.7", "--port", "0"], {}, "there are no keys"),
        (["--port", "70000"], {}, "port 70000 is not in 0..65535"),
        ([], {"LLEP_SERVER_PORT": "http"}, "LLEP_SERVER_PORT='http'"),
        ([], {"LLEP_SERVER_PROT": "80"}, "did you mean LLEP_SERVER_PORT"),
        ([], {"LLEP_SERVER_INSECURE": "maybe"}, "LLEP_SERVER_INSECURE='maybe'"),
        ([], {"LLEP_SERVER_ALLOWED_HOSTS": "here, http://here:80"}, "'http://here:80' is not a host's name"),
        (["--keys-file", "/nowhere/keys"], {}, "keys file /nowhere/keys can't be read"),
        (["--ray-address", "somewhere"], {}, "'somewhere'"),
    ],
)
def test_refusals(llep: Llep, flags: list[str], variables: dict[str, str], words: str) -> None:
    ended = llep("control-plane", *flags, **variables)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_an_address_of_another_machine(llep: Llep) -> None:
    ended = llep("control-plane", "--host", "192.0.2.7", "--insecure")
    assert ended.returncode == 1 and "host 192.0.2.7 can't be listened on" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_open_beyond_loopback_only_when_told(environ: dict[str, str]) -> None:
    with control_plane(environ, "--host", "0.0.0.0", "--insecure") as (_, url, _):
        port = url.rpartition(":")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}/livez", headers={"Host": "any.example"}, trust_env=False)
        assert answer.status_code == 200


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "10.0.0.1", "no-such-host.invalid", "", "\ud800")))


def test_configuration_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "LLEP_SERVER_HOST": "0.0.0.0",
        "LLEP_SERVER_PORT": "0",
        "LLEP_SERVER_KEYS_FILE": "~/keys",
        "LLEP_SERVER_ALLOWED_HOSTS": "Here, [::1],",
        "LLEP_STATE_DIR": str(tmp_path),
        "LLEP_RAY_ADDRESS": "10.0.0.1:6379",
        "LLEP_RAY_NAMESPACE": "staging",
    }
    config = ServerConfig.from_env(environ)
    assert config == ServerConfig(
        host="0.0.0.0",
        port=0,
        keys_file=Path("~/keys").expanduser(),
        allowed_hosts=("here", "[::1]"),
        state_dir=tmp_path,
        ray_address="10.0.0.1:6379",
        ray_namespace="staging",
    )
    assert ServerConfig.from_env(environ | {"LLEP_SERVER_STATE_DIR": "/var/llep"}).state_dir == Path("/var/llep")
    with pytest.raises(UnsupportedConfiguration, match="no keys"):
        ServerConfig.from_env(environ | {"LLEP_SERVER_KEYS_FILE": ""})
