"""A real vLLM on two ranks that is asked without end: every reply must come, and be what the first one was."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from llep.tiny_models import write_tiny_model
from tests.vllm.engine import TP_EP, VOCABULARY, Reply, serving

PROMPTS, PROMPT_TOKENS = 4, 150
PAUSE_S = 0.5  # what was killed needs the cores too, to come back
TOLERANCE = 1e-4  # of log-probabilities
SETTINGS = {
    "LLEP_MIN_BATCH_TOKENS": "16",
    "LLEP_MIN_CHUNK_TOKENS": "8",
    "LLEP_IMBALANCE_THRESHOLD": "1.05",
    "LLEP_REPORT_INTERVAL_S": "0.2",
}


class Served:
    """Use in `with`; LLEP_RAY_ADDRESS and its like are taken from the environment."""

    name = "served"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.replies = 0
        self.failures: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> Served:
        model = write_tiny_model("gpt-oss", self._folder / "model", hot=tuple(range(8)), hot_share=0.9).directory
        ours = {key: value for key, value in os.environ.items() if key.startswith("LLEP_")}
        env = {**ours, **SETTINGS, "LLEP_ENGINE": self.name}
        flags = (*TP_EP, "--enforce-eager")
        self._engine = self._stack.enter_context(
            serving(model, *flags, log=self._folder / "served.log", env=env, yields=True)
        )
        rng = random.Random(0)
        self._prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
        self._expected = [self._engine.greedy(prompt) for prompt in self._prompts]
        self._thread.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(120)
        self._stack.close()

    def kill_agent(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"llep.scheduler.agent" in words and self.name.encode() in words:
                    os.kill(int(path.name), signal.SIGKILL)

    def _ask(self) -> None:
        while not self._ends.is_set():
            number = self.replies % PROMPTS
            started_s = time.monotonic()
            try:
                if not _alike(self._engine.greedy(self._prompts[number]), self._expected[number]):
                    self.failures.append("another reply than the first")
            except Exception as error:  # whatever it is: it counts
                self.failures.append(repr(error))
            self.replies += 1
            self.longest_s = max(self.longest_s, time.monotonic() - started_s)
            self._ends.wait(PAUSE_S)


def _alike(one: Reply, other: Reply) -> bool:
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return one.tokens == other.tokens and all(abs(a - b) < TOLERANCE for a, b in pairs)
