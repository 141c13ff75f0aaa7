"""Agent and client where there is no Ray: clear errors in bounded time, no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llep.errors import SchedulerUnreachable, UnsupportedConfiguration
from llep.scheduler.bridge import RAY_HAS_ENDED
from llep.scheduler.client import SchedulerClient
from tests.scheduler.conftest import RunningEngine, free_port, wait_for


def test_a_call_without_ray_says_where_and_what_to_do(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"

    async def body() -> None:
        async with SchedulerClient(address, "test", tmp_path) as client:
            assert not await client.wait_connected(0.01)
            for _ in range(2):
                started_s = time.monotonic()
                with pytest.raises(SchedulerUnreachable) as error:
                    await client.call("engines")
                assert time.monotonic() - started_s < 10
                assert address in error.value.message and "ray start --head" in error.value.message
                await asyncio.sleep(2)
            assert "nothing listens there" in client.problem

    asyncio.run(body())


def test_something_that_listens_but_never_answers(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            address = f"127.0.0.1:{mute.getsockname()[1]}"
            async with SchedulerClient(address, "test", tmp_path) as client:
                with pytest.raises(SchedulerUnreachable, match=r"no answer to status within 0\.5 s"):
                    await client.call("status", timeout_s=0.5)
                with pytest.raises(SchedulerUnreachable, match="whether the change was stored is not known"):
                    await client.call("patch_settings", {"mode": "off"}, "me", timeout_s=0.5)

    asyncio.run(body())


def test_a_ray_that_ends_while_it_is_joined_is_not_waited_for(tmp_path: Path) -> None:
    """Its successor at the address is joined by another bridge."""

    async def body() -> None:
        accepted: list[asyncio.StreamWriter] = []
        mute = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
        address = f"127.0.0.1:{mute.sockets[0].getsockname()[1]}"
        async with SchedulerClient(address, "test", tmp_path) as client:
            while len(accepted) < 3:  # whether anybody listens, how long, and Ray's own
                await asyncio.sleep(0.05)
            mute.close()
            for writer in accepted:
                writer.close()
            async with asyncio.timeout(10):
                while RAY_HAS_ENDED not in client.problem:
                    await asyncio.sleep(0.05)

    asyncio.run(body())


def test_the_bridge_ends_with_its_client(tmp_path: Path) -> None:
    async def body() -> int:
        async with SchedulerClient(f"127.0.0.1:{free_port()}", "test", tmp_path) as client:
            while not client.problem:
                await asyncio.sleep(0.05)
            assert client._bridge is not None and client._bridge._process is not None
            return client._bridge._process.pid

    pid = asyncio.run(body())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


HOLDER = """
import asyncio, sys
from llep.scheduler.client import SchedulerClient
async def main():
    async with SchedulerClient(sys.argv[1], "test") as client:
        while not client.problem:
            await asyncio.sleep(0.05)
        print(client._bridge._process.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def test_the_bridge_ends_when_its_client_is_killed() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"127.0.0.1:{free_port()}"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    bridge = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    holder.stdout.close()
    wait_for(lambda: not is_running(bridge), 10)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WITHOUT_RAY = """
import asyncio, sys
sys.modules["ray"] = None  # as where it isn't installed
from llep.errors import SchedulerUnreachable
from llep.scheduler.client import SchedulerClient
async def main():
    async with SchedulerClient("127.0.0.1:6379", "test") as client:
        try:
            await client.call("status")
        except SchedulerUnreachable as error:
            print(error.message)
asyncio.run(main())
"""


def test_the_client_works_up_to_a_clear_error_where_ray_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, timeout=30)
    assert "pip install 'llep[scheduler]'" in done.stdout and done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:99999", "ray://127.0.0.1:10001", ":6379"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UnsupportedConfiguration, match="neither 'auto' nor host:port"):
        SchedulerClient(address)


@pytest.fixture
def lonely_engine(short_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """An engine whose agent finds no Ray."""
    monkeypatch.setenv("LLEP_RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    engine = RunningEngine("lonely", short_folder, {"report_interval_s": 0.1})
    yield engine
    engine.end()


def test_an_agent_without_ray_says_so_once_and_goes_on(lonely_engine: RunningEngine) -> None:
    lonely_engine.start_agent()
    lonely_engine.start_workers()
    wait_for(lambda: "nothing listens there" in lonely_engine.agent_log())
    time.sleep(3)
    log = lonely_engine.agent_log()
    assert log.count("nothing listens there") == 1 and len(log.splitlines()) == 2, log
    assert lonely_engine.goes_on()


STARTER = """
import subprocess, sys, os, time
command = [sys.executable, "-m", "llep.scheduler.agent", "--engine", "e", "--socket", sys.argv[1]]
agent = subprocess.Popen([*command, "--parent-pid", str(os.getpid())])
print(agent.pid, flush=True)
time.sleep(60)
"""


def test_an_agent_ends_with_the_process_that_started_it(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEP_RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    path = short_folder / "orphan.sock"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(path)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    agent = int(starter.stdout.readline())
    wait_for(path.exists)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_for(lambda: not is_running(agent), 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--socket", "/tmp/" + "x" * 200], "longer than the 107 bytes"),
        (["--socket", "/proc/nowhere/socket"], "/proc/nowhere/socket can't be bound"),
    ],
)
def test_an_agent_that_can_not_listen(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "llep.scheduler.agent", "--engine", "e", "--parent-pid", str(os.getpid())]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_an_agent_ends_when_told_to_or_when_nobody_reports(lonely_engine: RunningEngine) -> None:
    lonely_engine.start_agent()
    wait_for(lambda: (lonely_engine.folder / "lonely.sock").exists())
    assert lonely_engine.agent is not None
    lonely_engine.agent.send_signal(signal.SIGTERM)
    assert lonely_engine.agent.wait(10) == 0
    command = [sys.executable, "-m", "llep.scheduler.agent", "--engine", "e", "--parent-pid", str(os.getpid())]
    options = ["--socket", str(lonely_engine.folder / "quiet.sock"), "--silence-limit-s", "0.5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "no worker has reported for 0.5 s" in done.stderr
