"""What lending gains under natural skew, in real vLLM on two CPU ranks: planner `home` against lending by turns.

The trained model's experts are widened with zeros: they choose and compute what they did, at the cost of larger ones,
so that experts and not Python take the time. Prints one JSON line a planner and workload.

    python -m bench.natural.gain models/natural-gpt-oss [--planners quota least_loaded] [--repeats 7] [--append]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from bench.natural.workloads import PROMPT_TOKENS, Workloads
from bench.record import add_record
from bench.serving import PROMPT_TOKENS as STEP_TOKENS
from bench.serving import Engine
from llep.messages import Report

WIDTH = 2048
PROMPTS = STEP_TOKENS // PROMPT_TOKENS
BEFORE = {"planner": "home"}
AFTER = {"imbalance_threshold": 1.05, "min_chunk_tokens": 64, "min_batch_tokens": 256}


def widen(model: Path, into: Path, width: int) -> None:
    """A gpt-oss checkpoint with the intermediate size `width` that computes the same: what is new is zero."""
    shutil.copytree(model, into)
    config = json.loads((model / "config.json").read_text())
    more = width - config["intermediate_size"]
    if config["model_type"] != "gpt_oss" or more < 0:
        raise SystemExit(f"{model} must be a gpt-oss with an intermediate size of at most {width}")
    # Shapes [E, H, 2I], [E, 2I], [E, I, H]; gate and up take turns, and gate 0 gives 0 whatever up is.
    added = {
        "experts.gate_up_proj": (2, 2 * more),
        "experts.gate_up_proj_bias": (1, 2 * more),
        "experts.down_proj": (1, more),
    }
    weights = load_file(model / "model.safetensors")
    for name, array in weights.items():
        for suffix, (axis, count) in added.items():
            if name.endswith(suffix):
                weights[name] = _padded(array, axis, count)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))


def _padded(array: npt.NDArray[Any], axis: int, count: int) -> npt.NDArray[Any]:
    return np.pad(array, [(0, count if at == axis else 0) for at in range(array.ndim)])


def measure(engine: Engine, workloads: Workloads, name: str, after: dict[str, Any], repeats: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    prompts = list(workloads.prompts(name, PROMPTS * (repeats + 1)))
    for repeat in range(repeats + 1):
        batch = prompts[repeat * PROMPTS : (repeat + 1) * PROMPTS]
        for side in ("before", "after") if repeat % 2 else ("after", "before"):
            engine.switch(BEFORE if side == "before" else after)
            engine.prefill(batch[0][:8])  # the switch happens at a step's beginning; this is that step
            first = engine.reports()[0]
            measured = engine.prefill(*batch)
            if repeat:  # the first round warms up
                runs[side].append({**measured, **_balance(first, engine.reports()[0])})
    return _summary(runs)


def _balance(before: Report, after: Report) -> dict[str, float]:
    """Mean over layers of the imbalance ratio, before and after balancing, and lends per layer and step."""
    assert before.group is not None and after.group is not None
    sums_S = (after.group.imbalance_sum_PLS.numpy() - before.group.imbalance_sum_PLS.numpy()).sum(axis=(0, 1))
    layer_steps = int((after.group.layer_steps_PL.numpy() - before.group.layer_steps_PL.numpy()).sum())
    lends = int((after.group.lends_in_PRK.numpy() - before.group.lends_in_PRK.numpy()).sum())
    return {
        "ratio_before": float(sums_S[0]) / layer_steps,
        "ratio_after": float(sums_S[1]) / layer_steps,
        "lends": lends / layer_steps,
    }


def _summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    median = {side: {key: statistics.median(run[key] for run in of) for key in of[0]} for side, of in runs.items()}
    ratios = sorted(b["moe_s"] / a["moe_s"] for b, a in zip(runs["before"], runs["after"], strict=True))
    return {
        "imbalance_ratio_before": round(median["after"]["ratio_before"], 3),
        "imbalance_ratio_after": round(median["after"]["ratio_after"], 3),
        "lends_per_layer_step": round(median["after"]["lends"], 2),
        "moe_s": [round(median[side]["moe_s"], 4) for side in runs],
        "moe_ratio": round(statistics.median(ratios), 3),
        "moe_ratio_min_max": [round(ratios[0], 3), round(ratios[-1], 3)],
        "prefill_s": [round(median[side]["prefill_s"], 4) for side in runs],
        "prefill_ratio": round(median["before"]["prefill_s"] / median["after"]["prefill_s"], 3),
        "ideal_ratio": round(median["before"]["ratio_before"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--planners", nargs="+", default=["quota"], metavar="planner")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="append to bench/results/natural.jsonl")
    asked = parser.parse_args()
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("LLEP_RAY_ADDRESS", None)
    workloads = Workloads(asked.model)
    with tempfile.TemporaryDirectory() as folder:
        widen(asked.model, Path(folder) / "wide", WIDTH)
        engine = Engine(Path(folder) / "wide", eager=True)
        for planner, name in itertools.product(asked.planners, workloads.names):
            after = {"planner": planner, **AFTER}
            found = measure(engine, workloads, name, after, asked.repeats)
            what = {"case": "gain", "workload": name, "ranks": 2, "intermediate": WIDTH, "repeats": asked.repeats}
            settings = {"before_settings": BEFORE, "after_settings": after}
            add_record("natural", {**what, "planner": planner, **settings, **found}, append=asked.append)
        engine.close()


if __name__ == "__main__":
    main()
