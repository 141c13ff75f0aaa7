"""vLLM's experts of one layer on one rank, as llep's layer wants them: what is lent, and how to compute with it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from llep.errors import UnsupportedConfiguration
from llep.moe.dispatch import Index
from llep.moe.slots import is_lendable

# Not an expert's weights: activation scales that all experts share, and what the router uses.
_SHARED_BY_EXPERTS = ("w13_input_scale", "w2_input_scale", "e_score_correction_bias", "hash_indices_table")


# Kernels that leave out the pairs whose expert a map says is elsewhere, under CUDA-graph capture too.
_LEAVE_OUT = ("TritonExperts", "MarlinExperts", "OAITritonExperts", "UnfusedOAITritonExperts")

# Kernels that take an id for a row of the weights they are given, however many rows there are. Others (FlashInfer's,
# TensorRT-LLM's) take it for an expert of the whole model and look for it by the rank's own place, or keep sizes and
# scales of the layer's own experts: with lent weights they would compute something else.
_BY_ROW = (
    *_LEAVE_OUT,
    *("DeepGemmExperts", "TritonOrDeepGemmExperts"),
    *("CPUUnquantizedExperts", "X86CPUUnquantizedExperts", "ArmCPUUnquantizedExperts", "PowerCPUUnquantizedExperts"),
    *("CPUExpertsFp8", "CPUExpertsFp8W8A8", "CPUExpertsMxfp4", "CPUExpertsInt4", "CPUExpertsInt8"),
)
_OTHER_KERNEL = (
    "choose another with --moe-backend (marlin for MXFP4, triton for FP8 and what is not quantized), or run without "
    "llep (VLLM_PLUGINS='')"
)

# All of vLLM's workers that can sleep; the others derive from one of them.
_WORKERS = (("vllm.v1.worker.gpu_worker", "Worker"), ("vllm.v1.worker.cpu_worker", "CPUWorker"))
# What they are told to do to weights: not all of it goes through the experts' loader.
_CHANGES = (
    *("reload_weights", "reset_weights", "update_weights"),
    *("start_weight_update", "start_draft_weight_update", "finish_weight_update"),
)

_num_loads = 0
_is_asleep = False  # weights may have no memory
_when_loaded: list[Callable[[], None]] = []
_when_woken: list[Callable[[], None]] = []


def count_loads() -> None:
    """Have vLLM tell whenever it loads weights of experts, also anew while serving, by whatever way."""
    _wrap(RoutedExperts, "weight_loader", _telling)


def count_changes() -> None:
    """Have the workers that are loaded tell when they change weights, sleep, or wake up: weights may be lost then."""
    for module, name in _WORKERS:
        if worker := getattr(sys.modules.get(module), name, None):
            for change in _CHANGES:
                _wrap(worker, change, _telling)
            _wrap(worker, "sleep", _sleeping)
            _wrap(worker, "discard", _discarding)
            _wrap(worker, "wake_up", _waking)


def when_loaded(tell: Callable[[], None]) -> None:
    """Have tell() called before every load of an expert's weights: often, so it is quick, and inside of vLLM's loaders,
    which count and replace Tensor.copy_, so it uses none. Not while asleep."""
    _when_loaded.append(tell)


def when_woken(tell: Callable[[], None]) -> None:
    """Have tell() called once weights have their memory again, and maybe nothing that was in it."""
    _when_woken.append(tell)


def num_loads() -> int:
    """How often weights of an expert were loaded in this process, or woken up."""
    return _num_loads


def _wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Harmless when repeated."""
    method = getattr(owner, name)
    if not hasattr(method, "is_wrapped_by_llep"):
        wrapped = functools.wraps(method)(around(method))
        wrapped.is_wrapped_by_llep = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    def changes(*args: Any, **kwargs: Any) -> Any:
        global _num_loads
        _num_loads += 1
        if not _is_asleep:
            for tell in _when_loaded:
                tell()
        return method(*args, **kwargs)

    return changes


def _sleeping(method: Callable[..., Any]) -> Callable[..., Any]:
    def sleep(*args: Any, **kwargs: Any) -> Any:
        global _is_asleep
        _is_asleep = True
        return method(*args, **kwargs)

    return sleep


def _discarding(method: Callable[..., Any]) -> Callable[..., Any]:
    def discard(worker: Any, tags: tuple[str, ...]) -> Any:
        global _is_asleep
        _is_asleep = _is_asleep or "weights" in tags
        return method(worker, tags)

    return discard


def _waking(method: Callable[..., Any]) -> Callable[..., Any]:
    def wake_up(worker: Any, tags: list[str] | None = None) -> Any:
        global _num_loads, _is_asleep
        result = method(worker, tags)
        if tags is None or "weights" in tags:
            _num_loads += 1
            _is_asleep = False
            for tell in _when_woken:
                tell()
        return result

    return wake_up


class VllmExperts:
    """Wraps vLLM's RoutedExperts after its weights are loaded and repacked.

    The unchanged kernel runs on rows that were gathered for it, one (token, expert) pair a row, with no expert map:
    every row's expert is in the bank it is computed with.
    """

    def __init__(self, routed_experts: Any) -> None:
        self._routed = routed_experts
        self.top_k: int = routed_experts.top_k
        self.gate_on_input: bool = routed_experts.apply_router_weight_on_input
        self.weights: dict[str, torch.Tensor] = {}
        self._other_kernels: list[tuple[Mapping[str, torch.Tensor], mk.FusedMoEKernel]] = []
        self._maps: dict[int, torch.Tensor] = {}  # of compute_chosen, by number of rows
        self.take_weights()

    def take_weights(self) -> None:
        """Look at the layer's weights, which vLLM has just loaded, or loaded again into other tensors."""
        self.weights.update(_lendable(self._routed))
        self._home_kernel = _local_kernel(_fused_experts(self._routed))
        self._prepare_map(self.weights)
        self._parameters = [dict(self._routed.named_parameters(recurse=False))[name] for name in self.weights]

    @property
    def writes(self) -> int:
        """How often the layer's weights were written in place, as torch counts it."""
        return sum(parameter._version for parameter in self._parameters if not parameter.is_inference())

    @property
    def local_map_E(self) -> torch.Tensor:
        """[E] int64: the row of each expert in this rank's weights, -1 for those that live elsewhere."""
        expert_map: torch.Tensor | None = self._routed._expert_map
        if expert_map is None:
            raise UnsupportedConfiguration("this layer has no expert map: start vLLM with --enable-expert-parallel")
        return expert_map.to(torch.int64)

    def prepare_bank(self, bank: Mapping[str, torch.Tensor]) -> None:
        """Make the kernel that computes with other weights of this shape, lent or resident: vLLM's own, over a copy of
        the layer that has them."""
        view = copy.copy(self._routed)
        view._parameters = {
            **self._routed._parameters,
            **{name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in bank.items()},
        }
        config = self._routed.quant_method.get_fused_moe_quant_config(view)
        self._refuse_copies(config, bank)
        experts = _with_config(_fused_experts(self._routed), config)
        self._other_kernels.append((bank, _local_kernel(experts)))
        self._prepare_map(bank)

    @property
    def leaves_out(self) -> bool:
        """Whether `compute_chosen` saves what it leaves out, and may be captured."""
        return type(_fused_experts(self._routed)).__name__ in _LEAVE_OUT

    def compute(
        self,
        bank: Mapping[str, torch.Tensor],
        rows_PH: torch.Tensor,
        experts_G: Index,
        counts_G: Index,
        gates_P: torch.Tensor,
    ) -> torch.Tensor:
        """gate x expert(row) of each row -> [P, H]; see llep.moe.layer.Experts."""
        output_PH: torch.Tensor = self._kernel_of(bank).apply(
            hidden_states=rows_PH,
            w1=bank["w13_weight"],
            w2=bank["w2_weight"],
            topk_weights=gates_P[:, None].to(torch.float32),
            topk_ids=torch.from_numpy(np.repeat(experts_G.astype(np.int32), counts_G)[:, None]).to(rows_PH.device),
            activation=self._routed.activation,
            global_num_experts=bank["w13_weight"].shape[0],
            expert_map=None,
            apply_router_weight_on_input=self.gate_on_input,
        )
        return output_PH

    def compute_chosen(
        self, bank: Mapping[str, torch.Tensor], hidden_TH: torch.Tensor, gates_TK: torch.Tensor, rows_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over k of gate x expert(hidden) -> [T, H]; see llep.moe.captured.ChosenExperts."""
        num_rows = bank["w13_weight"].shape[0]
        expert_map = None
        if self.leaves_out:
            expert_map = self._maps[num_rows]
        else:  # left out in the sum alone
            is_chosen_TK = rows_TK < num_rows
            rows_TK, gates_TK = rows_TK.where(is_chosen_TK, 0), gates_TK * is_chosen_TK
        output_TH: torch.Tensor = self._kernel_of(bank).apply(
            hidden_states=hidden_TH,
            w1=bank["w13_weight"],
            w2=bank["w2_weight"],
            topk_weights=gates_TK.to(torch.float32),
            topk_ids=rows_TK,
            activation=self._routed.activation,
            global_num_experts=num_rows + (expert_map is not None),
            expert_map=expert_map,
            apply_router_weight_on_input=self.gate_on_input,
        )
        return output_TH

    def restore_maps(self) -> None:
        """After sleep, which may have lost them: graphs read them where they are."""
        for rows, places in self._maps.items():
            places.copy_(_places(rows))

    def _kernel_of(self, bank: Mapping[str, torch.Tensor]) -> mk.FusedMoEKernel:
        if bank is self.weights:
            return self._home_kernel
        return next(kernel for known, kernel in self._other_kernels if known is bank)

    def _refuse_copies(self, config: FusedMoEQuantConfig | None, bank: Mapping[str, torch.Tensor]) -> None:
        """Raise unless the kernel reads scales and biases where they are lent to: what vLLM makes of them ahead, of a
        bank that is still empty, would never hear of what is lent."""
        routed = self._routed
        shared = [it for name, it in routed.named_parameters(recurse=False) if name in _SHARED_BY_EXPERTS]
        known = {tensor.untyped_storage().data_ptr() for tensor in (*bank.values(), *shared)}
        for part in () if config is None else (config._a1, config._a2, config._w1, config._w2):
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor) and value.ndim and value.untyped_storage().data_ptr() not in known:
                    raise UnsupportedConfiguration(
                        f"{type(routed.quant_method).__name__} gives {type(_fused_experts(routed)).__name__} a {name} "
                        f"of shape {tuple(value.shape)} that is made of the weights ahead, so that it would be stale "
                        f"once others are lent: {_OTHER_KERNEL}"
                    )

    def _prepare_map(self, bank: Mapping[str, torch.Tensor]) -> None:
        """Made ahead: no capture copies from the host."""
        weights = bank["w13_weight"]
        self._maps.setdefault(len(weights), _places(len(weights)).to(weights.device))


def _places(rows: int) -> torch.Tensor:
    """Every row is where it is, the one behind the last elsewhere."""
    return torch.tensor([*range(rows), -1], dtype=torch.int32)


def _local_kernel(experts: mk.FusedMoEExpertsModular) -> mk.FusedMoEKernel:
    """A kernel that computes the rows it is given, where they are: llep has moved them already."""
    return mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


def _with_config(experts: mk.FusedMoEExpertsModular, config: FusedMoEQuantConfig | None) -> mk.FusedMoEExpertsModular:
    """The same kernel with other scales and biases; of one that chooses between two by the batch, both."""
    made = copy.copy(experts)
    made.quant_config = config
    for name, value in vars(experts).items():
        if isinstance(value, mk.FusedMoEExpertsModular):
            setattr(made, name, _with_config(value, config))
    return made


def _fused_experts(routed_experts: Any) -> mk.FusedMoEExpertsModular:
    method = routed_experts.quant_method
    kernel = method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if not isinstance(experts, mk.FusedMoEExpertsModular) or (
        experts.activation_format() != mk.FusedMoEActivationFormat.Standard
    ):
        raise UnsupportedConfiguration(
            f"{type(method).__name__} computes its experts with {type(experts).__name__}, a monolithic or batched "
            f"kernel that llep can't give rows to: {_OTHER_KERNEL}"
        )
    if type(experts).__name__ not in _BY_ROW:
        raise UnsupportedConfiguration(
            f"{type(method).__name__} computes its experts with {type(experts).__name__}, which is not known to "
            f"compute with lent weights what it computes with its own: {_OTHER_KERNEL}"
        )
    return experts


def _lendable(routed_experts: Any) -> dict[str, torch.Tensor]:
    """Every tensor whose first dimension is local experts: weights, scales, biases, packed or not."""
    weights = {
        name: parameter.data
        for name, parameter in routed_experts.named_parameters(recurse=False)
        if name not in _SHARED_BY_EXPERTS and parameter.ndim > 0
    }
    for name, tensor in weights.items():
        if tensor.shape[0] != routed_experts.local_num_experts or not is_lendable(tensor):
            raise UnsupportedConfiguration(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; llep lends tensors that have "
                f"the {routed_experts.local_num_experts} local experts as their first dimension, each a stretch of "
                f"memory of its own: {_OTHER_KERNEL}"
            )
    for name in ("w13_weight", "w2_weight"):
        if name not in weights:
            raise UnsupportedConfiguration(
                f"{type(routed_experts.quant_method).__name__} keeps no {name} tensor that llep could lend: "
                f"{_OTHER_KERNEL}"
            )
    return weights
