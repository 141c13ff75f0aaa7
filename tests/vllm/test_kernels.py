"""Which of vLLM's kernels llep gives lent weights to, by vLLM's own classes; the kernels themselves may need a GPU."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llep.errors import UnsupportedConfiguration
from llep.moe.slots import LendingPool

# vLLM and what it imports are not written for warnings as errors.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

HOME_SCALES = [2.0, 3.0]


def kernels() -> dict[str, type]:
    """All of vLLM's modular kernels whose modules can be imported here."""
    from vllm.model_executor.layers.fused_moe import experts, hpc_moe, modular_kernel

    assert hpc_moe
    for module in pkgutil.iter_modules(experts.__path__, f"{experts.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError:  # wants a GPU's packages
            pass

    def below(kind: type) -> list[type]:
        return [kind, *(it for sub in kind.__subclasses__() for it in below(sub))]

    return {kind.__name__: kind for kind in below(modular_kernel.FusedMoEExpertsModular)}


def made(name: str) -> Any:
    """A kernel as far as it can be made without a GPU."""
    kernel = object.__new__(kernels()[name])
    kernel.__dict__["moe_config"] = SimpleNamespace(moe_parallel_config=None)
    return kernel


def layer_with(experts: object, method: Any = None) -> torch.nn.Module:
    """What VllmExperts reads of vLLM's RoutedExperts: two local experts with a scale each."""
    layer = torch.nn.Module()
    layer.local_num_experts, layer.top_k, layer.apply_router_weight_on_input = 2, 2, False
    weights = {"w13_weight": torch.ones(2, 8, 4), "w2_weight": torch.ones(2, 4, 4)}
    scales = {f"{name}_weight_scale": torch.tensor(HOME_SCALES) for name in ("w13", "w2")}
    shared = {f"{name}_input_scale": torch.tensor(0.5) for name in ("w13", "w2")}
    for name, tensor in {**weights, **scales, **shared}.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.quant_method = method or SimpleNamespace()
    layer.quant_method.moe_kernel = SimpleNamespace(fused_experts=experts)
    return layer


def test_kernels_that_are_used_go_by_rows_alone() -> None:
    """None looks for experts by the rank's place in its group, or keeps a size of the layer's own."""
    from llep.vllm_plugin.experts import _BY_ROW

    found = kernels()
    assert set(_BY_ROW) <= set(found)
    for name in _BY_ROW:
        ours = [kind for kind in found[name].__mro__ if kind.__module__.startswith("vllm") and "apply" in vars(kind)]
        source = "".join(inspect.getsource(kind) for kind in ours if not inspect.isabstract(kind))
        for word in ("ep_rank", "ep_size", "num_local_experts", "local_expert_offset"):
            assert word not in source, (name, word)


@pytest.mark.parametrize(
    "name", ["FlashInferExperts", "FlashInferCuteDSLExperts", "CutlassExpertsFp8", "TritonOrCutlassExperts"]
)
def test_kernels_that_go_by_more_than_rows_are_refused(name: str) -> None:
    from llep.vllm_plugin.experts import VllmExperts

    with pytest.raises(UnsupportedConfiguration, match=f"{name}.*--moe-backend"):
        VllmExperts(layer_with(made(name)))


class _Fp8:
    """As Fp8MoEMethod makes its configuration anew for a layer."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def get_fused_moe_quant_config(self, layer: Any) -> object:
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend, make_fp8_moe_quant_config

        return make_fp8_moe_quant_config(
            Fp8MoeBackend(self.backend),
            w1_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            a1_scale=layer.w13_input_scale,
            a2_scale=layer.w2_input_scale,
            layer=layer,
        )


def test_what_is_made_of_weights_ahead_is_refused() -> None:
    """FlashInfer's scales are products that vLLM makes when asked: those of an empty pool would stay zeros."""
    from llep.vllm_plugin.experts import VllmExperts

    method = _Fp8("FLASHINFER_CUTLASS")
    experts = VllmExperts(layer_with(made("TritonExperts"), method))
    pool = LendingPool.reserve(experts.weights, 2)
    with pytest.raises(UnsupportedConfiguration, match=r"alpha_or_gscale.*stale.*--moe-backend"):
        experts.prepare_bank(pool.tensors)


@pytest.mark.parametrize("parts", [(), ("DeepGemmExperts", "TritonExperts")])
def test_lent_scales_are_what_a_kernel_reads(parts: tuple[str, ...]) -> None:
    """Also both of the kernels between which one chooses by the batch."""
    from llep.vllm_plugin.experts import VllmExperts

    kernel = made("TritonOrDeepGemmExperts" if parts else "TritonExperts")
    kernel.__dict__.update(zip(("experts", "fallback_experts"), map(made, parts), strict=False))
    experts = VllmExperts(layer_with(kernel, _Fp8("TRITON")))
    pool = LendingPool.reserve(experts.weights, 2)
    experts.prepare_bank(pool.tensors)
    for name, tensor in experts.weights.items():
        pool.tensors[name].copy_(tensor)  # both experts
    found: Any = experts._kernel_of(pool.tensors).fused_experts
    for reads in (found, found.experts, found.fallback_experts) if parts else (found,):
        assert reads.quant_config.w1_scale.tolist() == HOME_SCALES
    assert not any(hasattr(it, "quant_config") for it in (kernel, *vars(kernel).values()))  # it stays as it was
