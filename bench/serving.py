"""What lending gains in real vLLM on this machine's CPU: two ranks, one core each, plans switched live in one engine.

Skewed: tiny gpt-oss, hidden 1024, ~93% of the pairs on one of two ranks; planner `home` against lending, in turn.
Balanced: the same without hot experts; mode `off` against lending, in turn. Prints and appends one JSON line a case.

    python -m bench.serving [skewed balanced] [--repeats 7] [--append]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.messages import PROTOCOL, Directive, Report, decode_report, encode
from llep.tiny_models import write_tiny_model

PROMPT_TOKENS = 4096
VOCABULARY = 2048
EXTENSION = "llep.vllm_plugin.worker.WorkerExtension"
CASES: dict[str, dict[str, Any]] = {
    "skewed": {
        "model": {"hot": tuple(range(8)), "hot_share": 0.93},
        "before": {"planner": "home"},
        "after": {},
    },
    "balanced": {"model": {}, "before": {"mode": "off"}, "after": {}},
}


class Engine:
    """vLLM in this process, its workers beside it."""

    def __init__(self, model: Path, eager: bool) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            model=str(model),
            dtype="float32",
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enforce_eager=eager,
            max_model_len=PROMPT_TOKENS + 16,
            max_num_batched_tokens=PROMPT_TOKENS,
            enable_prefix_caching=False,
            worker_extension_cls=EXTENSION,
            disable_log_stats=True,
        )
        self._sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        self._revision = 0

    def switch(self, settings: dict[str, Any]) -> None:
        self._revision += 1
        directive = Directive(protocol=PROTOCOL, engine="bench", revision=self._revision, settings=settings)
        self._llm.collective_rpc("llep_offer", args=(encode(directive),))

    def close(self) -> None:
        """End the workers: left to itself at exit, vLLM waits for them for ever."""
        self._llm.llm_engine.engine_core.shutdown()

    def reports(self) -> list[Report]:
        return [decode_report(report) for report in self._llm.collective_rpc("llep_report")]

    def step(self) -> int:
        """Steps so far, dummy ones included."""
        return self.reports()[0].step

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> None:
        """Serve the prompts together, each with a reply of so many tokens, sampled."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=1.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    def prefill(self, *prompts: list[int]) -> dict[str, float]:
        """One prefill of all prompts: its seconds, and those in MoE layers on the slowest rank."""
        before = self.reports()
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self.reports()
        moe = [b.layer_seconds - a.layer_seconds for a, b in zip(before, after, strict=True)]
        return {"prefill_s": seconds, "moe_s": max(moe), **_loads(before[0], after[0])}


def _loads(before: Report, after: Report) -> dict[str, float]:
    assert before.group is not None and after.group is not None
    routed = after.group.routed_LR.numpy().sum(axis=0) - before.group.routed_LR.numpy().sum(axis=0)
    computed = after.group.computed_LR.numpy().sum(axis=0) - before.group.computed_LR.numpy().sum(axis=0)
    total = max(int(routed.sum()), 1)
    return {"routed_share": float(routed.max() / total), "computed_share": float(computed.max() / total)}


def run(case: str, repeats: int, layers: int, eager: bool) -> dict[str, Any]:
    setup = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(
            "gpt-oss",
            Path(folder) / "model",
            layers=layers,
            hidden=1024,
            intermediate=1024,
            experts=16,
            top_k=4,
            vocab=VOCABULARY,
            **setup["model"],
        )
        engine = Engine(model.directory, eager)
        rng = random.Random(0)
        runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for repeat in range(repeats + 1):
            prompt = [rng.randrange(300, VOCABULARY - 200) for _ in range(PROMPT_TOKENS)]
            for name in ("before", "after") if repeat % 2 else ("after", "before"):
                engine.switch(setup[name])
                engine.prefill(prompt[:8])  # the switch happens at a step's beginning; this is that step
                measured = engine.prefill(prompt)
                if repeat:  # the first round warms up
                    runs[name].append(measured)
        engine.close()
    return {"case": case, "layers": layers, "repeats": repeats, "eager": eager, **_summary(runs, setup)}


def _summary(runs: dict[str, list[dict[str, float]]], setup: dict[str, Any]) -> dict[str, Any]:
    median = {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    ratios = [b["prefill_s"] / a["prefill_s"] for b, a in zip(runs["before"], runs["after"], strict=True)]
    summary: dict[str, Any] = {
        "before_settings": setup["before"],
        "after_settings": setup["after"],
        "before": _rounded(median["before"]),
        "after": _rounded(median["after"]),
        "prefill_ratio": round(median["before"]["prefill_s"] / median["after"]["prefill_s"], 3),
        "prefill_ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    if median["before"]["moe_s"]:  # mode off counts nothing, its layers are not timed
        summary["moe_ratio"] = round(median["before"]["moe_s"] / median["after"]["moe_s"], 3)
        summary["ideal_ratio"] = round(median["before"]["routed_share"] * 2, 3)
    return summary


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile; eager otherwise")
    parser.add_argument("--append", action="store_true", help="append to bench/results/serving.jsonl")
    options = parser.parse_args(arguments)
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("LLEP_RAY_ADDRESS", None)
    for case in options.cases:
        add_record("serving", run(case, options.repeats, options.layers, not options.compiled), append=options.append)


if __name__ == "__main__":
    main()
