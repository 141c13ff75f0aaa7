"""Processes of `llep serve`: ended with all that they started, started again, never cut in two by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llep.cli.supervise import Child, StopRequested, StopSignals, sweep

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)
# Starts another process in a process group, or session, of its own, says its pid and waits.
PARENT = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", {other!r}], stdout=subprocess.DEVNULL, {how})
print(other.pid, flush=True)
time.sleep(60)
"""


def parent_of(other: str, how: str) -> str:
    return PARENT.format(other=other, how=how)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts `python -c code` as a Child, waits for its first line, and ends it after the test."""
    children: list[Child] = []

    def run(code: str, stop_s: float = 10.0, **environment: str) -> Child:
        log = tmp_path / f"{len(children)}.log"
        child = Child("it", [sys.executable, "-c", code], {**os.environ, **environment}, log, stop_s)
        children.append(child)
        child.start()
        wait_for(lambda: "\n" in log.read_text() or child.status is not None)
        return child

    yield run
    for child in children:
        child.stop_s = 0.0
        child.stop()


def wait_for(what: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_child_ends_in_good_order(start: Callable[..., Child]) -> None:
    child = start("import time; print('ready', flush=True); time.sleep(60)")
    assert child.status is None
    assert child.process is not None and os.getsid(child.process.pid) == child.process.pid != os.getsid(0)
    child.stop()
    assert child.status == -signal.SIGTERM
    child.stop()  # twice does no harm


def test_a_stubborn_child_and_what_it_started_are_killed(start: Callable[..., Child]) -> None:
    child = start(
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{parent_of(STUBBORN, 'process_group=0')}", 0.2
    )
    other = int(child.last_words())
    assert is_alive(other)
    child.stop()
    assert child.status == -signal.SIGKILL
    wait_for(lambda: not is_alive(other))


def test_urgent_is_at_once(start: Callable[..., Child]) -> None:
    child = start(STUBBORN, stop_s=3600.0)
    child.stop(lambda: True)
    assert child.status == -signal.SIGKILL


def test_a_restart_is_not_hindered_by_what_was_left(start: Callable[..., Child]) -> None:
    child = start(parent_of(STUBBORN, "process_group=0"))
    other = int(child.last_words())
    assert child.process is not None
    child.process.kill()
    wait_for(lambda: child.status is not None)
    assert is_alive(other)
    child.restart()
    assert not is_alive(other)
    assert child.status is None


def test_pauses_between_restarts_grow(start: Callable[..., Child]) -> None:
    child = start("print('ended', flush=True)")
    wait_for(lambda: child.status == 0)
    assert not child.is_due_again()
    wait_for(child.is_due_again)
    time.sleep(0.2)  # the next pause is two seconds after its start
    assert not child.is_due_again()


def test_last_words(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start("print('first'); print('last one\\n\\n', flush=True)")
    wait_for(lambda: child.status == 0)
    assert child.last_words() == "last one"
    assert Child("it", [], {}, None).last_words() == Child("it", [], {}, tmp_path / "nothing").last_words() == ""


def test_what_left_its_session_is_swept_by_its_mark(start: Callable[..., Child]) -> None:
    mark = uuid.uuid4().hex
    child = start(parent_of(STUBBORN, "start_new_session=True"), LLEP_TEST_MARK=mark)
    other = int(child.last_words())
    bystander = start(STUBBORN, LLEP_TEST_MARK=f"{mark}x")
    child.stop()
    assert is_alive(other)
    sweep("LLEP_TEST_MARK", mark)
    wait_for(lambda: not is_alive(other))
    assert bystander.status is None


def test_who_ends_by_itself_is_given_the_time(start: Callable[..., Child], tmp_path: Path) -> None:
    mark, done = uuid.uuid4().hex, tmp_path / "done"
    slow = f"import time, pathlib; time.sleep(1); pathlib.Path({str(done)!r}).touch()"
    child = start(parent_of(slow, "start_new_session=True"), LLEP_TEST_MARK=mark)
    child.stop()
    sweep("LLEP_TEST_MARK", mark)
    assert done.exists()


def test_shared_memory_of_the_killed_is_removed(start: Callable[..., Child]) -> None:
    name = Path("/dev/shm") / f"llep-test-{uuid.uuid4().hex}"
    mapping = f"f = open({str(name)!r}, 'w+b'); f.truncate(4096); import mmap; m = mmap.mmap(f.fileno(), 4096)\n"
    child = start(mapping + STUBBORN, stop_s=0.1)
    assert name.exists()
    child.stop()
    assert not name.exists()


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from llep.cli.supervise import Child
child = Child("it", [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, Path({str(tmp_path / "log")!r}))
child.start()
print(child.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not is_alive(pid))


def test_a_signal_is_acted_on_in_a_pause_only() -> None:
    signals = StopSignals()
    before = signal.getsignal(signal.SIGINT)
    with signals.heeded():
        signals.pause(0.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.is_urgent
        with pytest.raises(StopRequested):
            signals.pause(3600.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.is_urgent
        with pytest.raises(StopRequested):
            signals.pause(0.0)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_ends_a_pause() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests too may run under nohup
    signals = StopSignals()
    try:
        with signals.heeded(), pytest.raises(StopRequested):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
            signals.pause(3600.0)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().heeded():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
