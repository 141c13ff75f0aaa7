"""The worker's side of the talk with the agent: a thread that sends reports and takes directives over ZMQ.

Workers never join Ray: a process that has joined dies when Ray's control store stays away. Rank 0 starts the agent,
which joins, and starts it again whenever it is gone. Nothing here can hold up or fail a forward pass.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from llep.messages import Report, decode_directive, encode
from llep.moe.agreement import AgreedSettings

if TYPE_CHECKING:
    from llep.moe.replicas import Replicas

logger = logging.getLogger("vllm.llep")

LONGEST_RESTART_PAUSE_S = 5.0
STEADY_AFTER_S = 20.0
SIGN_OF_LIFE_S = 2.0  # an empty frame, so that an agent started anew soon knows who is there
MIN_POLL_S, MAX_POLL_S = 0.01, 0.25


class AgentProcess:
    """The agent beside this engine, started again with growing pauses when it is gone."""

    def __init__(self, socket: str, engine: str) -> None:
        self._command = [
            *(sys.executable, "-m", "llep.scheduler.agent"),
            *("--socket", socket, "--engine", engine, "--parent-pid", str(os.getpid())),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._pause_s = 1.0

    def keep_running(self) -> None:
        """Start the agent if it is not running and its pause is over."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            if now - self._started_s > STEADY_AFTER_S:
                self._pause_s = 1.0
            return
        if self._process is not None:
            if now - self._started_s < self._pause_s:
                return
            logger.warning("llep: the agent ended with status %s; starting it again", self._process.returncode)
            self._pause_s = min(2 * self._pause_s, LONGEST_RESTART_PAUSE_S)
        # A session of its own: Ctrl-C on the terminal is for the server, and the agent follows its parent.
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._started_s = now


class Courier(threading.Thread):
    """Sends make_report() every report_interval_s, and at once when a revision arrives or goes live, or a placement is
    switched on; takes directives.

    Reports are cumulative: one that can't be sent is dropped, the next one says it all.
    """

    def __init__(
        self,
        socket: str,
        make_report: Callable[[], Report],
        agreed: AgreedSettings,
        replicas: Replicas,
        agent: AgentProcess | None,
    ) -> None:
        super().__init__(name="llep-courier", daemon=True)
        self._socket_path = socket
        self._make_report = make_report
        self._agreed = agreed
        self._replicas = replicas
        self._agent = agent

    def run(self) -> None:
        Path(self._socket_path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)
        socket.setsockopt(zmq.RECONNECT_IVL, 200)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.connect(f"ipc://{self._socket_path}")
        _leave_the_cores_of_this_rank()
        next_report_s = last_sign_s = 0.0
        told_live = (-1, -1)
        while True:
            try:
                if self._agent is not None:
                    self._agent.keep_running()
                now = time.monotonic()
                live = self._agreed.live.number, self._replicas.live_number
                if now >= next_report_s or live != told_live:
                    told_live = live
                    next_report_s = now + self._agreed.live.settings.report_interval_s
                    last_sign_s = now
                    socket.send(encode(self._make_report()), zmq.NOBLOCK)
                elif now >= last_sign_s + SIGN_OF_LIFE_S:
                    last_sign_s = now
                    socket.send(b"", zmq.NOBLOCK)
                if socket.poll(int(1000 * min(max(next_report_s - now, MIN_POLL_S), MAX_POLL_S))):
                    # A directive, or an agent that was started anew and asks who is there: either wants a report.
                    if directive := socket.recv():
                        self._agreed.offer(decode_directive(directive))
                    next_report_s = 0.0
            except zmq.Again:
                pass  # the agent is away: the next report says it all
            except Exception as error:  # whatever it is: if this thread ended, nobody would hear of this rank again
                logger.warning("llep: the talk with the agent failed, serving goes on: %r", error)
                time.sleep(1.0)


def _leave_the_cores_of_this_rank() -> None:
    """vLLM keeps the cores busy to which it binds a worker: this thread and the agent run wherever vLLM itself may."""
    with contextlib.suppress(OSError, AttributeError):  # no such thing on this system
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
