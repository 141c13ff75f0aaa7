"""The openai client against a stack, greedy, adding up the tokens that go through the model."""

from __future__ import annotations

import random
import threading
from typing import Any, Self

from openai import OpenAI

from tests.e2e.stack import LAYERS, TOP_K, Stack

ANSWER_WITHIN_S = 120.0  # the first time vLLM compiles, beside whatever else the machine does
WORDS = "def return the a model token expert rank load plan of to lend spill fox dog over lazy quick brown".split()
PROBE = "A plan says which rank computes which tokens of each expert, and who sends weights to whom. " * 3


class Client:
    """The openai client, adding up the tokens that went through the model. Its connections end with `with`."""

    def __init__(self, stack: Stack, model: str = "model") -> None:
        self._model = model
        self._openai = OpenAI(base_url=f"{stack.api}/v1", api_key="none", timeout=ANSWER_WITHIN_S, max_retries=0)
        self._lock = threading.Lock()
        self.tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._openai.close()

    def complete(self, prompt: str | list[int], max_tokens: int = 1) -> str:
        """The greedy continuation, as long as asked for."""
        answer = self._openai.completions.create(
            model=self._model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        self._count(answer.usage)
        return answer.choices[0].text

    def stream(self, prompt: str, max_tokens: int) -> list[str]:
        answer = self._openai.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        *chunks, last = answer
        self._count(last.usage)
        return [chunk.choices[0].text for chunk in chunks]

    def chat(self, content: str, max_tokens: int) -> Any:
        answer = self._openai.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": content}], max_tokens=max_tokens, temperature=0
        )
        self._count(answer.usage)
        return answer.choices[0]

    def stream_chat(self, content: str, max_tokens: int) -> str:
        answer = self._openai.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = answer
        self._count(last.usage)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def _count(self, usage: Any) -> None:
        # The last token is given out, but not fed back.
        with self._lock:
            self.tokens += usage.prompt_tokens + usage.completion_tokens - 1


def prompts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def by_rank(stack: Stack, name: str) -> list[int]:
    found = stack.metric(name)
    return [int(found[("ep_rank", str(rank)),]) for rank in range(2)]


def is_all_counted(stack: Stack, client: Client) -> bool:
    return sum(by_rank(stack, "llep_rank_routed_tokens_total")) == client.tokens * TOP_K * LAYERS


def assert_counts_are_exact(stack: Stack, client: Client) -> None:
    """Every pair of every real token is counted once, and nothing else: no padding, dummy or profiling step."""
    stack.wait_for(lambda: sum(by_rank(stack, "llep_rank_routed_tokens_total")) >= client.tokens * TOP_K * LAYERS, 10)
    routed, computed = (by_rank(stack, f"llep_rank_{which}_tokens_total") for which in ("routed", "computed"))
    assert sum(routed) == sum(computed) == client.tokens * TOP_K * LAYERS
