"""Who may import what: deciding never moves, vLLM, Ray and torch stay in their folders, the command line is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Third-party packages by path; the longest path that fits counts, and every module may import llep.
ALLOWED = {
    "llep": "numpy",
    "llep/config.py": "pydantic yaml",
    "llep/views.py": "pydantic",
    "llep/messages.py": "numpy msgspec",
    "llep/spool.py": "msgspec",
    "llep/cost.py": "numpy yaml",
    "llep/traces.py": "numpy pyarrow",
    "llep/planning/native.py": "numpy numba",
    "llep/planning/peers.py": "numpy scipy",
    "llep/planning/milp.py": "numpy scipy",
    "llep/tiny_models": "numpy safetensors tokenizers",
    "llep/training": "numpy torch transformers tokenizers",
    "llep/moe": "numpy torch",
    "llep/vllm_plugin": "numpy torch vllm msgspec zmq fastapi starlette",
    "llep/scheduler": "numpy ray msgspec zmq",
    "llep/cli": "numpy typer rich httpx yaml packaging",
    "llep/cli/calibrate.py": "numpy typer rich torch",
    "server/llep_server/tracing.py": "opentelemetry starlette llep_server",
    "server/llep_server/tables.py": "pyarrow fastapi llep_server",
    "server/llep_server": "numpy pydantic fastapi starlette uvicorn prometheus_client llep_server",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


MODULES = sorted(str(path.relative_to(ROOT)) for top in ("llep", "server") for path in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_its_layer_may(name: str) -> None:
    path = ROOT / name
    rule = max((prefix for prefix in ALLOWED if name == prefix or name.startswith(f"{prefix}/")), key=len)
    packages = {module.partition(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - {"llep"}
    assert packages <= set(ALLOWED[rule].split()), f"{name} may import {ALLOWED[rule]}"
    is_transport = name == "llep/moe/transport.py"
    assert is_transport or "torch.distributed" not in imports(path), "torch.distributed belongs in moe/transport.py"


HEAVY = ("torch", "vllm", "ray")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("llep", (*HEAVY, "numba", "scipy", "pyarrow", "fastapi", "numpy")),
        ("llep.planning", (*HEAVY, "numba", "scipy", "pyarrow", "fastapi")),
        ("llep.simulate", (*HEAVY, "fastapi")),
        ("llep_server.app", HEAVY),
        ("llep.cli", (*HEAVY, "numba", "scipy", "pyarrow", "fastapi", "numpy")),
        ("llep.vllm_plugin", HEAVY),
    ],
)
def test_importing_starts_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
