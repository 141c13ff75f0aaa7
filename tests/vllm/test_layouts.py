"""What vLLM makes of quantized experts, by its own code, is lent byte for byte; their kernels may need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llep.errors import UnsupportedConfiguration
from tests.dist.ranks import start_ranks
from tests.dist.test_weights import Layouts, lent_bytes

# vLLM and what it imports are not written for warnings as errors.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

EXPERTS, HIDDEN, INTERMEDIATE = 2, 256, 128


@pytest.fixture(autouse=True)
def one_tensor_parallel_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1))


def created(method_class: type, **attributes: Any) -> torch.nn.Module:
    """The layer's parameters as vLLM's method makes them; what its constructor asks a GPU about is given."""
    method = object.__new__(method_class)
    has_bias = bool(attributes.pop("has_bias", False))
    method.__dict__.update(moe=SimpleNamespace(w13_num_shards=2, has_bias=has_bias), **attributes)
    layer = torch.nn.Module()
    method.create_weights(layer, EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16, weight_loader=None)  # type: ignore[attr-defined]
    return layer


def fp8(block: list[int] | None) -> torch.nn.Module:
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

    return created(
        Fp8MoEMethod,
        block_quant=block is not None,
        weight_block_size=block,
        moe_block_shape=block,
        weight_scale_refine=None,
        weight_scale_name="weight_scale_inv" if block else "weight_scale",
        quant_config=SimpleNamespace(activation_scheme="dynamic"),
    )


def fp8_blocks() -> torch.nn.Module:
    """DeepSeek's: as it is for Triton and CUTLASS kernels."""
    return fp8([128, 128])


def fp8_blocks_for_cpu() -> torch.nn.Module:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_fp8_moe_layer_for_cpu

    layer = fp8([128, 128])
    for name, packed in zip(
        ("w13", "w2"), prepare_fp8_moe_layer_for_cpu(layer.w13_weight, layer.w2_weight), strict=True
    ):
        setattr(layer, f"{name}_weight", torch.nn.Parameter(packed, requires_grad=False))
    return layer


def fp8_blocks_for_deep_gemm() -> torch.nn.Module:
    """Scales column by column, as RoutedExperts.get_expert_weights describes them: vLLM's code for it needs a GPU."""
    layer = fp8([128, 128])
    for name in ("w13_weight_scale_inv", "w2_weight_scale_inv"):
        scale = getattr(layer, name).data
        setattr(
            layer, name, torch.nn.Parameter(scale.transpose(1, 2).contiguous().transpose(1, 2), requires_grad=False)
        )
    return layer


def fp8_per_tensor() -> torch.nn.Module:
    """After vLLM has made one scale of w1's and w3's."""
    layer = fp8(None)
    layer.w13_weight_scale = torch.nn.Parameter(layer.w13_weight_scale.max(dim=1).values, requires_grad=False)
    return layer


def mxfp4(*, has_bias: bool = True) -> torch.nn.Module:
    """gpt-oss's: two values a byte, a scale for 32 of them, biases."""
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

    return created(GptOssMxfp4MoEMethod, has_bias=has_bias)


def mxfp4_for_b12x() -> torch.nn.Module:
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle

    layer = mxfp4()
    names = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias")
    made = oracle.convert_weight_to_mxfp4_moe_kernel_format(
        oracle.Mxfp4MoeBackend.B12X_MXFP4_BF16, layer, *(getattr(layer, name) for name in names)
    )
    for name, tensor in zip(names, made, strict=True):
        setattr(layer, name, torch.nn.Parameter(tensor.data, requires_grad=False))
    return layer


MAKERS = (fp8_blocks, fp8_blocks_for_cpu, fp8_blocks_for_deep_gemm, fp8_per_tensor, mxfp4, mxfp4_for_b12x)


def lendable(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    from llep.vllm_plugin.experts import _lendable

    layer.local_num_experts, layer.quant_method = EXPERTS, SimpleNamespace()
    return _lendable(layer)


def layouts_of(make: Callable[[], torch.nn.Module]) -> Layouts:
    return {name: (it.dtype, tuple(it.shape[1:]), it.stride()[1:]) for name, it in lendable(make()).items()}


def can_pack_for_cpu() -> bool:
    """vLLM packs fp8 for CPUs with AVX-512 alone; its build for others has no such operator."""
    return hasattr(torch.ops._C, "convert_weight_packed")


def test_quantized_experts_are_lent_byte_for_byte() -> None:
    makers = [make for make in MAKERS if make is not fp8_blocks_for_cpu or can_pack_for_cpu()]
    layouts = {make.__name__: layouts_of(make) for make in makers}
    assert {it[0] for it in layouts["fp8_blocks"].values()} == {torch.float8_e4m3fn, torch.float32}
    assert layouts["fp8_blocks_for_deep_gemm"]["w13_weight_scale_inv"] == (torch.float32, (2, 2), (1, 2))
    assert layouts["mxfp4"]["w13_weight"] == (torch.uint8, (2 * INTERMEDIATE, HIDDEN // 2), (HIDDEN // 2, 1))
    assert set(layouts["mxfp4_for_b12x"]) >= {"w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias"}
    for way in ("gloo", "reading"):
        assert start_ranks(lent_bytes, 5, layouts, 1, way) == [len(makers) * 4] * 5


def test_weights_that_are_no_parameters_are_refused_with_a_way_out() -> None:
    """Triton's MXFP4 kernels keep them in tensors of their own, scales elsewhere: lending the rest would be wrong."""
    layer = mxfp4()
    del layer.w13_weight
    layer.w13_weight = object()  # type: ignore[assignment]
    with pytest.raises(UnsupportedConfiguration, match="keeps no w13_weight tensor.*--moe-backend"):
        lendable(layer)
