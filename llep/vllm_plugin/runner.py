"""LeastLoadedMoERunner: in place of vLLM's MoERunner, for every MoE model, by vLLM's own mechanism for that."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from llep.config import Mode
from llep.errors import LlepError, UnsupportedConfiguration
from llep.planning.policy import plans_replicas
from llep.vllm_plugin.experts import count_loads
from llep.vllm_plugin.rank import Rank, RankLayer

logger = logging.getLogger("vllm.llep")

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, gates, expert ids -> output

# What LeastLoadedMoERunner overrides, as vLLM defines it: a vLLM that changed it is refused, not guessed at.
_EXPECTED_PARAMETERS = {
    "_apply_quant_method": (
        *("self", "hidden_states", "router_logits", "shared_experts_input", "input_ids", "shared_experts_overlapping"),
    ),
    "_forward_impl": ("self", "hidden_states", "router_logits", "shared_experts_input", "input_ids"),
    "_maybe_dispatch": ("self", "hidden_states", "router_logits"),
    "_maybe_combine": ("self", "shared_output", "hidden_states"),
    "_select_forward": ("self",),
}

_rank: Rank | None = None


class _WeightsReady(QuantizeMethodBase):  # type: ignore[misc]
    """vLLM calls `process_weights_after_loading` on each module that has a quant_method, in module order: on this one
    right after its layer's experts, whose weights are then in their final form, and before the KV cache is sized."""

    requires_device_loading = False

    def __init__(self, runner: LeastLoadedMoERunner) -> None:
        self._runner = runner

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        pass

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("holds no weights")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._runner.take_weights()


class LeastLoadedMoERunner(MoERunner):  # type: ignore[misc]
    """Routes as vLLM does, then computes the routed experts under llep's plan instead of plain EP.

    Without expert parallelism, in mode off and for small batches where vLLM's own expert parallelism works, everything
    is left to vLLM; under CUDA-graph capture too, but for layers that have room for replicas.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rank: Rank | None = None
        self._layer: RankLayer | None = None
        self._compute: Compute | None = None  # this step's way to compute the layer; None leaves it to vLLM
        if self.moe_config.ep_size > 1:
            with telling_refusals():
                self._rank = _join(get_current_vllm_config(), self)
                self._rank.expect_layer()
            ready = torch.nn.Module()
            ready.quant_method = _WeightsReady(self)
            self._llep_weights_ready = ready  # the last child: vLLM visits it after the experts

    def take_weights(self) -> None:
        """Reserve the pool and make ready to compute, when this layer's weights are in their final form."""
        assert self._rank is not None
        with telling_refusals():
            if self._layer is None:
                self._layer = self._rank.add_layer(self.layer_name, self.routed_experts)
            else:
                self._layer.experts.take_weights()
                self._rank.weights_taken += 1

    def _select_forward(self) -> Callable[..., Any]:
        if self.moe_config.ep_size == 1:
            entry: Callable[..., Any] = super()._select_forward()
            return entry
        # An opaque operator, also on CPU, where vLLM would let the compiler trace into the runner.
        has_shared = self._shared_experts is not None
        return torch.ops.vllm.moe_forward_shared if has_shared else torch.ops.vllm.moe_forward

    def _forward_impl(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        self._compute, is_both_ways = self._begin_layer(len(hidden_states))
        output = super()._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)
        if is_both_ways:
            self._compute = None
            super()._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)
        return output

    def _begin_layer(self, num_tokens: int) -> tuple[Compute | None, bool]:
        """How llep computes this layer in this step; None leaves the layer to vLLM. The same on all ranks.

        And whether it is computed both ways, for vLLM locks its workspace at the size that was asked for before it
        serves, and a call that wants more ends the engine: the largest batch goes both ways while it is made up.
        """
        if self._layer is None:
            return None, False
        assert self._rank is not None
        context = get_forward_context()
        may_be_captured = self._layer.placed.device_map is not None
        if is_captured(context):
            return partial(self._rank.run_captured, self._layer) if may_be_captured else None, False
        step = self._rank.begin_layer(self._layer, context, num_tokens)
        is_cpu = current_platform.is_cpu()  # where vLLM has neither a workspace nor working expert parallelism
        is_largest = not is_cpu and self._layer.is_largest_made_up(step)
        # vLLM makes up a step of each size before it captures one.
        if is_largest or (may_be_captured and not step.is_real):
            return partial(self._rank.rehearse_layer, self._layer, step, is_largest), is_largest
        compute = partial(self._rank.run_layer, self._layer, step)
        if is_cpu:
            return compute, False
        settings, layer = step.settings, self._layer
        is_small = step.step.tokens < settings.min_batch_tokens
        is_left_alone = settings.mode is Mode.OFF or (
            is_small and not plans_replicas(settings, layer.number, layer.placement)
        )
        return None if is_left_alone else compute, False

    def _maybe_dispatch(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._compute is None:
            return super()._maybe_dispatch(hidden_states, router_logits)  # type: ignore[no-any-return]
        return hidden_states, router_logits

    def _maybe_combine(self, shared_output: torch.Tensor | None, hidden_states: Any) -> Any:
        if self._compute is None:
            return super()._maybe_combine(shared_output, hidden_states)
        return hidden_states if shared_output is None else (shared_output, hidden_states)

    def _apply_quant_method(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        shared_experts_overlapping: bool = False,
    ) -> tuple[torch.Tensor | None, Any]:
        if self._compute is None:
            return super()._apply_quant_method(  # type: ignore[no-any-return]
                hidden_states, router_logits, shared_experts_input, input_ids, shared_experts_overlapping
            )
        self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
        gates_TK, ids_TK = self.router.select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            topk_indices_dtype=self._quant_method.topk_indices_dtype,
            input_ids=input_ids,
        )
        routed_TH = self._compute(hidden_states, gates_TK, ids_TK)
        if self._shared_experts is None:
            return None, routed_TH
        if shared_experts_overlapping:
            self._shared_experts.wait()
        return self._shared_experts.output, routed_TH


def is_captured(context: ForwardContext) -> bool:
    """Whether what runs now is put into a CUDA graph, to be replayed without any of this."""
    return bool(context.cudagraph_runtime_mode != CUDAGraphMode.NONE)


@contextmanager
def telling_refusals() -> Iterator[None]:
    """Keep what llep refuses where `llep serve` looks: between vLLM's tracebacks nobody would find it."""
    try:
        yield
    except LlepError as error:
        if path := os.environ.get("LLEP_REFUSAL_FILE"):
            Path(path).write_text(error.message)
        raise


def put_in_place() -> None:
    """Register LeastLoadedMoERunner with vLLM, once. Raises UnsupportedConfiguration if vLLM's runner has changed."""
    for method, expected in _EXPECTED_PARAMETERS.items():
        found = tuple(inspect.signature(getattr(MoERunner, method)).parameters)
        if found != expected:
            raise UnsupportedConfiguration(
                f"vLLM's MoERunner.{method} takes {found}, llep knows {expected}: install a tested vLLM, or set "
                "VLLM_PLUGINS='' to run without llep"
            )
    count_loads()
    if "MoERunner" not in op_registry_oot:
        MoERunner.register_oot(name="MoERunner")(LeastLoadedMoERunner)


def this_rank() -> Rank | None:
    """This process's Rank; None before the first MoE layer was made, or without expert parallelism."""
    return _rank


def _join(config: VllmConfig, runner: LeastLoadedMoERunner) -> Rank:
    """This process's Rank, made by its first MoE layer."""
    global _rank
    _refuse_conflicts(config, runner)
    if _rank is None or _rank.config is not config:
        _rank = Rank(config)
    return _rank


def _refuse_conflicts(config: VllmConfig, runner: LeastLoadedMoERunner) -> None:
    """Raise UnsupportedConfiguration, naming the way out, for what llep can't balance exactly."""
    parallel = config.parallel_config
    moe = runner.moe_config
    conflicts = [
        (parallel.enable_eplb, "--enable-eplb moves experts' homes while llep lends them", "drop --enable-eplb"),
        (
            parallel.tensor_parallel_size > 1 and parallel.data_parallel_size > 1 and not moe.is_sequence_parallel,
            f"--tensor-parallel-size {parallel.tensor_parallel_size} with --data-parallel-size "
            f"{parallel.data_parallel_size} and --all2all-backend {parallel.all2all_backend} would send every token "
            f"{parallel.tensor_parallel_size} times",
            "choose --all2all-backend allgather_reducescatter, or use one of the two with --enable-expert-parallel",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} makes several EP groups of one engine",
            "drop --pipeline-parallel-size",
        ),
        (
            config.offload_config.uva.cpu_offload_gb > 0 or config.offload_config.prefetch.offload_group_size > 0,
            "offloaded weights are not where they would be lent from",
            "drop --cpu-offload-gb and --offload-group-size",
        ),
        (config.lora_config is not None, "LoRA on experts is not lent with them", "drop --enable-lora"),
        (parallel.use_ubatching, "micro-batching (DBO) runs two steps at once", "drop --enable-dbo"),
        (moe.pcp_size > 1, "prefill context parallelism splits tokens", "drop --prefill-context-parallel-size"),
        (runner.is_monolithic, "the MoE kernel is monolithic: it routes by itself", "choose another --moe-backend"),
        (parallel.all2all_backend == "moonep", "--all2all-backend moonep balances by itself", "choose another backend"),
    ]
    for is_conflict, problem, way_out in conflicts:
        if is_conflict:
            raise UnsupportedConfiguration(
                f"llep can't work here: {problem}. Either {way_out}, or run without llep (VLLM_PLUGINS='')."
            )
