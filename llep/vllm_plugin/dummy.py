"""Which forward passes vLLM makes up itself, to profile, warm up or keep an idle rank in step: none of them counts.

Most come without attention metadata, but those that warm up attention kernels look like a batch of requests.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

# Both of vLLM's model runners; the others derive from one of them.
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")

_running = 0


def mark_dummy_runs() -> None:
    """Have the model runners that are loaded tell when a forward pass is made up. Harmless when repeated."""
    for name in _RUNNERS:
        runner = getattr(sys.modules.get(name), "GPUModelRunner", None)
        if runner is not None and not hasattr(runner._dummy_run, "is_marked_by_llep"):
            runner._dummy_run = _marked(runner._dummy_run)


def is_dummy_run() -> bool:
    return _running > 0


def _marked(run: Any) -> Any:
    @functools.wraps(run)
    def marked(*args: Any, **kwargs: Any) -> Any:
        global _running
        _running += 1
        try:
            return run(*args, **kwargs)
        finally:
            _running -= 1

    marked.is_marked_by_llep = True  # type: ignore[attr-defined]
    return marked
