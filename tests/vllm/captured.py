"""Loaded into vLLM's workers by test_captured.py: decode steps are computed as captured ones are.

A CPU captures nothing, so this is all but the graph: nothing is agreed on before such a step, and who computes what is
read from tensors.
"""

from __future__ import annotations

from typing import Any

from vllm.forward_context import ForwardContext

from llep.vllm_plugin import rank, runner
from tests.vllm.replicas import Extension

_captured = [0, 0]  # pairs that this rank computed in such steps, at home and in its room


def _is_decode(context: ForwardContext) -> bool:
    real_tokens, is_prefill = rank.tokens_of(context, 1)
    return real_tokens is not None and not is_prefill


def _counted(run: Any) -> Any:
    def counted(self: rank.Rank, layer: rank.RankLayer, hidden: Any, gates: Any, ids: Any) -> Any:
        placed = layer.placed
        assert placed.device_map is not None
        own, room = placed.device_map.rows(ids)
        _captured[0] += int((own < len(layer.experts.weights["w13_weight"])).sum())
        _captured[1] += int((room < placed.room.rows).sum())
        return run(self, layer, hidden, gates, ids)

    return counted


runner.is_captured = _is_decode
rank.is_mapped = lambda config, experts: True
rank.Rank.run_captured = _counted(rank.Rank.run_captured)  # type: ignore[method-assign]


class CapturedExtension(Extension):
    def captured(self) -> list[int]:
        return list(_captured)
