"""The commands in README and docs, and which test runs each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("llep", "curl", "make", "pip", "ray", "vllm", "kubectl", "docker", "python")

# By how they begin. Run by tests/unit/test_docs.py, which needs no engine:
ALONE = (
    *("llep simulate", "llep settings schema", "llep export", "llep --version", "llep report bench"),
    *("llep tune bench", "llep plan simulate", "llep plan place", "llep calibrate --help"),
)
# Run by tests/e2e/test_as_documented.py against a stack like that of `make serve`:
LIVE = (
    *("llep status", "llep top", "llep loads", "llep settings", "llep mode", "llep record", "llep report traffic.tar"),
    *("llep tune traffic.tar", "llep advice", "llep placement", "llep demo load", "curl"),
)
# Run as such, or with other arguments, by these tests: a small model for a large one, two CPU ranks for eight GPUs;
# kubectl without a cluster, where what it would make is compared with what the manifests want.
BY_OTHERS = {
    "make serve": "tests/e2e/test_serve.py",
    "make test": ".ci/run",
    "make dashboard": "tests/e2e/test_serve.py",
    "llep dashboard": "tests/ops/test_dashboards.py",
    "llep bench": "tests/e2e/test_as_documented.py",
    "llep control-plane": "tests/server/test_process.py",
    "llep doctor": "tests/unit/test_cli_doctor.py",
    "llep model train": "tests/unit/test_training.py",
    "llep serve openai/gpt-oss-120b": "tests/e2e/test_serve.py",
    "ray start": "tests/ops/test_clusters_as_documented.py",
    "vllm serve": "tests/ops/test_clusters_as_documented.py",
    "kubectl": "tests/ops/test_kubectl_as_documented.py",
    "python -m bench.natural.compare": "tests/unit/test_natural_traces.py",
}
# docs/support.md lists these, with the reasons.
NOT_RUN = {
    "docker compose": "wants Docker; `compose.yaml` is checked against its specification; run by podman by hand",
    'pip install "llep[vllm]"': "wants a release on an index; `make serve` installs the same from the tree",
}


def typed(path: Path) -> Iterator[str]:
    """The commands of the page's fenced blocks, in order, without comments and what stands before or after them."""
    for line in blocks(path.read_text()):
        command = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
        if command.startswith(tuple(f"{program} " for program in PROGRAMS)):
            yield command


def begins(command: str, with_one_of: tuple[str, ...] | dict[str, str]) -> bool:
    return any(f"{command} ".startswith((f"{start} ", f"{start}/")) for start in with_one_of)


def blocks(text: str) -> Iterator[str]:
    """Lines of fenced blocks, continued ones joined, comments and prompts taken off."""
    for block in re.findall(r"^```(?:sh|bash|console|text)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s+#\s.*$", "", line).strip().removeprefix("$ ").removesuffix("&").strip()
