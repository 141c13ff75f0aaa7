"""What lending gains in real vLLM on this machine's CPU: two ranks, one core each, plans switched live in one engine.

Skewed: tiny gpt-oss, hidden 1024, ~93% of the pairs on one of two ranks; planner `home` against lending, in turn.
Balanced: the same without hot experts; mode `off` against lending, in turn. Skewed-dp: as skewed, but data-parallel,
under `llep serve`, with one prompt for each rank. Prints and appends one JSON line a case.

    python -m bench.serving [skewed balanced skewed-dp] [--repeats 7] [--append]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.record import add_record
from llep.messages import LAYER_PHASES, PROTOCOL, Directive, Report, decode_report, encode
from llep.tiny_models import write_tiny_model
from tests.e2e.stack import DP_EP, Stack

PROMPT_TOKENS = 4096
VOCABULARY = 2048
TOP_K = 4
CHUNK = 128  # a GPU's 1,024 leave a CPU, for which few rows are work enough, more than it needs to
EXTENSION = "llep.vllm_plugin.worker.WorkerExtension"
CASES: dict[str, dict[str, Any]] = {
    "skewed": {
        "model": {"hot": tuple(range(8)), "hot_share": 0.93},
        "before": {"planner": "home"},
        "after": {"planner": "quota", "min_chunk_tokens": CHUNK},
    },
    "balanced": {"model": {}, "before": {"mode": "off"}, "after": {}},
    "skewed-dp": {
        "model": {"hot": tuple(range(8)), "hot_share": 0.93},
        "before": {"planner": "home"},
        "after": {"planner": "quota", "min_chunk_tokens": CHUNK},
    },
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

        sampling = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True)
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    def prefill(self, *prompts: list[int]) -> dict[str, float]:
        """One prefill of all prompts: its seconds, and those in MoE layers on the slowest rank."""
        before = self.reports()
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self.reports()
        moe_R = [_layer_seconds(b) - _layer_seconds(a) for a, b in zip(before, after, strict=True)]
        compute_R = _spent("compute", before, after)
        busiest = compute_R.index(max(compute_R))
        phases = {f"{phase}_s": _spent(phase, before, after)[busiest] for phase in LAYER_PHASES}
        return {"prefill_s": seconds, "moe_s": max(moe_R), **phases, **_loads(before[0], after[0])}


def _layer_seconds(report: Report) -> float:
    return sum(report.layer_seconds.values())


def _spent(phase: str, before: Sequence[Report], after: Sequence[Report]) -> list[float]:
    """Seconds of each rank in one phase of its MoE layers."""
    return [b.phase_seconds[phase].sum - a.phase_seconds[phase].sum for a, b in zip(before, after, strict=True)]


def _loads(before: Report, after: Report) -> dict[str, float]:
    assert before.group is not None and after.group is not None
    routed = (after.group.routed_PLR.numpy() - before.group.routed_PLR.numpy()).sum(axis=(0, 1))
    computed = (after.group.computed_PLR.numpy() - before.group.computed_PLR.numpy()).sum(axis=(0, 1))
    total = max(int(routed.sum()), 1)
    return {"routed_share": float(routed.max() / total), "computed_share": float(computed.max() / total)}


class DataParallelEngine:
    """`llep serve` with two data-parallel ranks, asked over HTTP."""

    def __init__(self, stack: Stack, layers: int) -> None:
        self._stack, self._layers = stack, layers
        stack.wait_until_serving()

    def switch(self, settings: dict[str, Any]) -> None:
        self._stack.patch(**settings)

    def prefill(self, *prompts: list[int]) -> dict[str, float]:
        """One prefill of all prompts at once: its seconds, and those in MoE layers on the slowest rank."""
        counts = [self._counts()]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(self._complete, prompts))
        seconds = time.perf_counter() - start
        tokens = self._layers * TOP_K * sum(map(len, prompts))
        self._stack.wait_for(lambda: sum(self._counts()["routed"]) >= sum(counts[0]["routed"]) + tokens, 30)
        counts.append(self._counts())
        spent = {key: [b - a for a, b in zip(counts[0][key], counts[1][key], strict=True)] for key in counts[0]}
        total = max(sum(spent["routed"]), 1)
        return {
            "prefill_s": seconds,
            "moe_s": max(spent["layer_seconds"]),
            "routed_share": max(spent["routed"]) / total,
            "computed_share": max(spent["computed"]) / total,
        }

    def _complete(self, prompt: list[int]) -> None:
        body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        httpx.post(f"{self._stack.api}/v1/completions", json=body, timeout=300).raise_for_status()

    def _counts(self) -> dict[str, list[float]]:
        names = {
            "routed": "llep_rank_routed_tokens_total",
            "computed": "llep_rank_computed_tokens_total",
            "layer_seconds": "llep_layer_seconds_total",
        }
        metrics = self._stack.metrics()
        return {key: [metrics[name][("ep_rank", str(rank)),] for rank in range(2)] for key, name in names.items()}


@contextmanager
def start_engine(
    case: str, model: Path, folder: Path, layers: int, eager: bool
) -> Iterator[Engine | DataParallelEngine]:
    if case.endswith("-dp"):
        limits = ("--max-model-len", str(PROMPT_TOKENS + 16), "--max-num-batched-tokens", str(PROMPT_TOKENS))
        flags = ("--dtype", "float32", "--no-enable-prefix-caching", *(["--enforce-eager"] if eager else []))
        with Stack(model, folder, *DP_EP, *limits, *flags) as stack:
            yield DataParallelEngine(stack, layers)
    else:
        engine = Engine(model, eager)
        yield engine
        engine.close()


def run(case: str, repeats: int, layers: int, eager: bool) -> dict[str, Any]:
    setup = CASES[case]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        model = write_tiny_model(
            "gpt-oss",
            Path(folder) / "model",
            layers=layers,
            hidden=1024,
            intermediate=1024,
            experts=16,
            top_k=TOP_K,
            vocab=VOCABULARY,
            **setup["model"],
        )
        with start_engine(case, model.directory, Path(folder), layers, eager) as engine:
            runs = measure(engine, setup, repeats, 2 if case.endswith("-dp") else 1)
    return {"case": case, "layers": layers, "repeats": repeats, "eager": eager, **_summary(runs, setup)}


def measure(
    engine: Engine | DataParallelEngine, setup: dict[str, Any], repeats: int, num_prompts: int
) -> dict[str, list[dict[str, float]]]:
    """What each of the two settings gave, in turn."""
    rng = random.Random(0)
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for repeat in range(repeats + 1):
        prompts = [[rng.randrange(300, VOCABULARY - 200) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)]
        for name in ("before", "after") if repeat % 2 else ("after", "before"):
            engine.switch(setup[name])
            engine.prefill(prompts[0][:8])  # the switch happens at a step's beginning; this is that step
            measured = engine.prefill(*prompts)
            if repeat:  # the first round warms up
                runs[name].append(measured)
    return runs


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
