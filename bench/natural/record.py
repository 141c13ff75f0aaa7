"""Records what a trained model routes in real vLLM on two ranks: one small recording per workload and phase.

llep model train gpt-oss models/natural-gpt-oss
python -m bench.natural.record models/natural-gpt-oss bench/natural/traces
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench.natural.workloads import Workloads
from bench.serving import Engine
from llep.shapes import PHASES, StepCounts
from llep.traces import Trace, write_trace
from llep.vllm_plugin.recording import FROM_START, PART_S

REQUESTS, ROUNDS, REPLY_TOKENS = 64, 10, 12  # a round's requests are served together
MOST_STEPS = 60  # kept of each workload and phase, spread evenly
NAME = "natural-gpt-oss"


@dataclass(frozen=True, slots=True)
class Part:
    """Steps [first, last] of the engine were this workload's."""

    workload: str
    first: int
    last: int


def serve(engine: Engine, workloads: Workloads, name: str) -> Part:
    first = engine.step() + 1
    prompts = list(workloads.prompts(name, REQUESTS * ROUNDS))
    start_s = time.monotonic()
    for start in range(0, len(prompts), REQUESTS):
        engine.generate(prompts[start : start + REQUESTS], REPLY_TOKENS)
    part = Part(name, first, engine.step())
    print(f"{name}: steps {part.first} to {part.last} in {time.monotonic() - start_s:.1f} s", flush=True)
    return part


def split(recording: Path, parts: list[Part], into: Path) -> None:
    """One recording per workload and phase, its steps numbered from 0."""
    trace = Trace(recording)
    shape = replace(trace.shape, name=NAME)
    steps = list(trace.steps())
    for part in parts:
        for phase in PHASES:
            chosen = [step for step in steps if part.first <= step.step <= part.last and step.phase == phase]
            every = -(-len(chosen) // MOST_STEPS)
            numbered = [StepCounts(index, phase, step.counts_LRE) for index, step in enumerate(chosen[::every])]
            folder = into / f"{part.workload}-{phase}"
            shutil.rmtree(folder, ignore_errors=True)
            write_trace(folder, shape, trace.num_ranks, numbered)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{folder}: {len(numbered)} of {len(chosen)} steps, {size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("traces", type=Path)
    asked = parser.parse_args()
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("LLEP_RAY_ADDRESS", None)
    workloads = Workloads(asked.model)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {FROM_START: "1", "LLEP_RECORD_DIR": folder}
        engine = Engine(asked.model, eager=True)
        parts = [serve(engine, workloads, name) for name in workloads.names]
        time.sleep(2 * PART_S)  # until the last part is whole
        engine.close()
        (recording,) = Path(folder).iterdir()
        split(recording, parts, asked.traces)


if __name__ == "__main__":
    main()
