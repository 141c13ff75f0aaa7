"""Run by test_tiny_models.py in a process of its own: what a real vLLM on one rank makes of models, as JSON.

python -m tests.vllm.routing MODEL... -> one after the other:
[{"token_ids": [[...]], "margins": [...], "counts": [[pairs by expert] by layer]}]
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

NUM_EXPERTS = 16
PROMPTS = ["The quick brown fox jumps over", "def main():\n    return", "Once upon a time"]


def watch_routers(model: Any) -> dict[str, list[np.ndarray]]:
    """Note what every router chooses from now on; the choice itself is left alone."""
    chosen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if hasattr(router, "select_experts"):
            chosen[name] = []
            router.select_experts = _noting(router.select_experts, chosen[name])
    return chosen


def _noting(select_experts: Any, into: list[np.ndarray]) -> Any:
    def select(*args: Any, **kwargs: Any) -> Any:
        weights, ids = select_experts(*args, **kwargs)
        into.append(ids.numpy().copy())
        return weights, ids

    return select


def look_at(model: str) -> dict[str, Any]:
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    (chosen,) = llm.apply_model(watch_routers)
    greedy = SamplingParams(temperature=0, max_tokens=48, logprobs=2, ignore_eos=True)
    replies = [output.outputs[0] for output in llm.generate(PROMPTS, greedy)]
    rng = random.Random(0)
    prompt: Any = {"prompt_token_ids": [rng.randrange(2000) for _ in range(3000)]}
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
    logprobs = [sorted(entry.logprob for entry in token.values()) for reply in replies for token in reply.logprobs]
    counts = [np.bincount(np.concatenate(ids).ravel(), minlength=NUM_EXPERTS).tolist() for ids in chosen.values()]
    return {
        "token_ids": [list(reply.token_ids) for reply in replies],
        "margins": [top - second for *_, second, top in logprobs],
        "counts": counts,
    }


def main(models: list[str]) -> None:
    found = []
    for model in models:
        found.append(look_at(model))
        cleanup_dist_env_and_memory()
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
