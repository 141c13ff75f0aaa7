"""A real vLLM on two ranks that is asked without end: every reply must come, and be what the first one was."""

from __future__ import annotations

import itertools
import os
import random
from contextlib import ExitStack
from pathlib import Path

from llep.tiny_models import write_tiny_model
from tests.e2e.processes import processes
from tests.e2e.stack import Traffic
from tests.vllm.engine import TP_EP, VOCABULARY, serving
from tests.vllm.test_exact import BALANCING, assert_equal

PROMPTS, PROMPT_TOKENS = 4, 150


class Served:
    """Use in `with`; LLEP_RAY_ADDRESS and its like are taken from the environment."""

    name = "served"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.traffic = Traffic(self._ask)

    def __enter__(self) -> Served:
        model = write_tiny_model("gpt-oss", self._folder / "model", hot=tuple(range(8)), hot_share=0.9).directory
        ours = {key: value for key, value in os.environ.items() if key.startswith("LLEP_")}
        env = {**ours, **BALANCING, "LLEP_REPORT_INTERVAL_S": "0.2", "LLEP_ENGINE": self.name}
        log = self._folder / "served.log"
        self._engine = self._stack.enter_context(
            serving(model, *TP_EP, "--enforce-eager", log=log, env=env, yields=True)
        )
        rng = random.Random(0)
        prompts = [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
        self._questions = itertools.cycle([(prompt, self._engine.greedy(prompt)) for prompt in prompts])
        self._stack.enter_context(self.traffic)
        return self

    def __exit__(self, *why: object) -> None:
        self._stack.close()

    def own_agents(self) -> list[int]:
        """Processes that talk to the scheduler for it."""
        command = "llep.scheduler.agent --socket", f"--engine {self.name} "
        return [process.pid for process in processes() if all(words in process.command for words in command)]

    def _ask(self) -> None:
        prompt, expected = next(self._questions)
        assert_equal([self._engine.greedy(prompt)], [expected])
