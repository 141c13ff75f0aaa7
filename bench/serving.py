"""What lending gains in real vLLM on this machine's CPU: two ranks, one core each, plans switched live in one engine.

Skewed: tiny gpt-oss, hidden 1024, ~93% of the pairs on one of two ranks; planner `home` against lending, in turn.
Balanced: the same without hot experts; mode `off` against lending, in turn. Skewed-dp: as skewed, but data-parallel,
with one prompt for each rank. Prints and appends one JSON line a case.

    python -m bench.serving [skewed balanced skewed-dp] [--repeats 7] [--append]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.messages import LAYER_PHASES, PROTOCOL, Directive, Report, decode_report, encode
from llep.tiny_models import write_tiny_model
from tests.vllm.engine import free_port

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

    def __init__(self, model: Path, eager: bool, tensor_parallel_size: int = 2) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            model=str(model),
            dtype="float32",
            tensor_parallel_size=tensor_parallel_size,
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
        return _measured(time.perf_counter() - start, before, self.reports())


def _measured(seconds: float, before: Sequence[Report], after: Sequence[Report]) -> dict[str, float]:
    """What a prefill took. moe_s: of the slowest rank, without its waits for the other to come to the layer."""
    spent_R = {phase: _spent(phase, before, after) for phase in LAYER_PHASES}
    moe_R = [
        _layer_seconds(b) - _layer_seconds(a) - count
        for a, b, count in zip(before, after, spent_R["count"], strict=True)
    ]
    slowest = moe_R.index(max(moe_R))
    phases = {f"{phase}_s": spent[slowest] for phase, spent in spent_R.items()}
    return {"prefill_s": seconds, "moe_s": moe_R[slowest], **phases, **_loads(before[0], after[0])}


def _layer_seconds(report: Report) -> float:
    return sum(report.layer_seconds.values())


def _spent(phase: str, before: Sequence[Report], after: Sequence[Report]) -> list[float]:
    """Seconds of each rank in one phase of its MoE layers."""
    return [_seconds(b, phase) - _seconds(a, phase) for a, b in zip(before, after, strict=True)]


def _seconds(report: Report, phase: str) -> float:
    return sum(histograms[phase].sum for histograms in report.phase_seconds.values())


def _loads(before: Report, after: Report) -> dict[str, float]:
    assert before.group is not None and after.group is not None
    routed = (after.group.routed_PLR.numpy() - before.group.routed_PLR.numpy()).sum(axis=(0, 1))
    computed = (after.group.computed_PLR.numpy() - before.group.computed_PLR.numpy()).sum(axis=(0, 1))
    total = max(int(routed.sum()), 1)
    return {"routed_share": float(routed.max() / total), "computed_share": float(computed.max() / total)}


class DataParallelEngine:
    """Two of vLLM, data-parallel ranks of one engine, each in a process of its own with one prompt of a pair."""

    def __init__(self, model: Path, eager: bool) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._ranks = []
        for rank in range(2):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve_rank, args=(rank, port, theirs, str(model), eager))
            process.start()
            theirs.close()
            self._ranks.append((process, mine))
        self._answers()

    def switch(self, settings: dict[str, Any]) -> None:
        self._ask("switch", settings, settings)

    def prefill(self, *prompts: list[int]) -> dict[str, float]:
        """One prefill of both prompts at once: its seconds, and those in MoE layers on the slowest rank."""
        first, second = prompts if len(prompts) == 2 else (prompts[0], prompts[0])
        before = self._ask("report")
        start = time.perf_counter()
        self._ask("prefill", first, second)
        seconds = time.perf_counter() - start
        return _measured(seconds, before, self._ask("report"))

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.send(("close",))
            process.join(60)
            process.kill()

    def _ask(self, what: str, *of_rank: Any) -> list[Any]:
        """The same of both ranks at once, each with what is its own -> what each answers."""
        for (_, pipe), own in zip(self._ranks, of_rank or [None, None], strict=True):
            pipe.send((what, own))
        return self._answers()

    def _answers(self) -> list[Any]:
        return [pipe.recv() for _, pipe in self._ranks]


def _serve_rank(rank: int, port: int, pipe: Connection, model: str, eager: bool) -> None:
    """One data-parallel rank: does what it is told through `pipe`, until it is closed."""
    os.environ |= {"VLLM_DP_RANK": str(rank), "VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_PORT": str(port)}
    engine = Engine(Path(model), eager, tensor_parallel_size=1)
    do: dict[str, Callable[[Any], Any]] = {
        "switch": engine.switch,
        "report": lambda _: engine.reports()[0],
        "prefill": lambda prompt: engine.generate([prompt], max_tokens=1),
    }
    pipe.send(None)
    while (told := pipe.recv())[0] != "close":
        pipe.send(do[told[0]](told[1]))
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
        is_dp = case.endswith("-dp")
        engine = (DataParallelEngine if is_dp else Engine)(model.directory, eager)
        try:
            runs = measure(engine, setup, repeats, 2 if is_dp else 1)
        finally:
            engine.close()
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
    for case in options.cases:
        add_record("serving", run(case, options.repeats, options.layers, not options.compiled), append=options.append)


if __name__ == "__main__":
    main()
