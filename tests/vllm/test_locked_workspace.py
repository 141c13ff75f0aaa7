"""Once vLLM has locked its workspace no batch asks for more of it, whichever way its layers are computed."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llep.config import Mode, Settings
from llep.planning.policy import Step

# vLLM and what it imports are not written for warnings as errors.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

MOST_TOKENS, TOP_K, CHUNK_ROWS, N, HIDDEN = 8192, 8, 8192, 48, 64


class Kernel:
    """Asks vLLM's workspace for what its Triton kernel would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
        from vllm.v1.worker.workspace import WorkspaceManager

        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
        self.workspace = WorkspaceManager(torch.device("meta"))
        self._kernel: Any = object.__new__(TritonExperts)

    def run(self, tokens: int, top_k: int) -> None:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        first, second, output = self._kernel.workspace_shapes(tokens, N, HIDDEN, top_k, 1, 1, None, MoEActivation.SILU)
        wanted = (max(prod(first), prod(output)),), torch.bfloat16
        self.workspace.get_simultaneous(wanted, (second, torch.bfloat16))


class OneRank:
    """A rank as the runner sees it: steps as they are told to come, and chunks of pairs in llep's own way."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.settings = Settings()
        self.is_real = False

    def begin_layer(self, layer: object, context: object, num_tokens: int) -> Any:
        from llep.vllm_plugin.rank import RankStep

        return RankStep(Step(phase="prefill", tokens=num_tokens), self.settings, num_tokens, self.is_real)

    def run_layer(self, layer: object, step: Any, hidden: torch.Tensor) -> None:
        self.kernel.run(min(len(hidden) * TOP_K // 8, CHUNK_ROWS), 1)

    def rehearse_layer(self, layer: object, step: Any, is_largest: bool, hidden: torch.Tensor) -> None:
        self.kernel.run(CHUNK_ROWS if is_largest else 1, 1)
        self.run_layer(layer, step, hidden)


@pytest.mark.parametrize("at_start", [Mode.ACTIVE, Mode.OFF])
def test_every_way_was_seen_before(at_start: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches below min_batch_tokens, and all of them in mode off, go vLLM's own way, whose rows are more."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from llep.vllm_plugin import runner as module
    from llep.vllm_plugin.rank import RankLayer

    ways: list[str] = []

    def vllms_own(self: Any, hidden: torch.Tensor, *rest: object) -> None:
        ways.append("vllm" if self._compute is None else "llep")
        if self._compute is None:
            kernel.run(len(hidden), TOP_K)
        else:
            self._compute(hidden)

    kernel = Kernel(monkeypatch)
    rank = OneRank(kernel)
    rank.settings = Settings(mode=at_start)
    runner: Any = object.__new__(module.LeastLoadedMoERunner)
    placed: Any = SimpleNamespace(device_map=None, placement=SimpleNamespace(replicas=()))
    runner.__dict__.update(_rank=rank, _layer=RankLayer(0, 0, SimpleNamespace(), placed))  # type: ignore[arg-type]
    monkeypatch.setattr(MoERunner, "_forward_impl", vllms_own)
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    eager = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.NONE)
    monkeypatch.setattr(module, "get_forward_context", lambda: eager)

    def run(tokens: int) -> list[str]:
        ways.clear()
        runner._forward_impl(torch.empty(tokens, HIDDEN, device="meta"), None, None)
        return list(ways)

    assert run(MOST_TOKENS) == ["llep", "vllm"]  # the run that sizes the KV cache
    assert len(run(512)) == len(run(MOST_TOKENS)) == 1  # later ones, before graphs are captured
    kernel.workspace.lock()
    rank.is_real = True
    for mode in (Mode.ACTIVE, Mode.OFF):
        rank.settings = Settings(mode=mode)
        for tokens in (1, 2047, MOST_TOKENS):
            is_ours = mode is Mode.ACTIVE and tokens == MOST_TOKENS
            assert run(tokens) == ["llep" if is_ours else "vllm"]
