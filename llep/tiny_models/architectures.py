"""config.json and the tensors of each kind of model, by the names of the published checkpoints.

Shape letters as in tensors.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from llep.tiny_models.options import HEAD_DIM, Kind, Options
from llep.tiny_models.tensors import (
    BIAS_STD,
    BLOCK_STD,
    CHAIN,
    ENDER,
    Floats,
    Tensor,
    embedding,
    no_reserved_columns,
    ones,
    output_head,
    reads,
    router,
    writes,
)
from llep.tiny_models.tokenizer import HARMONY_ASSISTANT, HARMONY_FINAL, TinyTokenizer

Tensors = dict[str, Tensor]
Biases = list[float]  # of the hot experts, by layer

# DeepSeek V3's attention. vLLM's CPU kernel knows these sizes only.
KV_LORA = 512
ROPE_DIM = 64
NOPE_DIM = 128
V_DIM = 128
ROUTED_SCALING = 2.5
DENSE_LAYERS = 1

SILU_MLP_STD = 0.6  # of silu(gate) * up for normal gate and up
CLAMPED_MLP_STD = 0.9  # the same for gpt-oss's (up + 1) * gate * sigmoid(1.702 gate)
QUERY_STD = 2.0  # above 1, so that attention picks some tokens over others


def moe_layers(options: Options) -> range:
    return range(DENSE_LAYERS if options.kind is Kind.DEEPSEEK else 0, options.layers)


def router_name(options: Options, layer: int) -> str:
    return f"model.layers.{layer}.mlp.{'router' if options.kind is Kind.GPT_OSS else 'gate'}.weight"


def config(options: Options, ends: list[int]) -> dict[str, Any]:
    """config.json."""
    common = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_experts_per_tok": options.top_k,
        "max_position_embeddings": options.max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": options.dtype.value,
        "eos_token_id": ends,
    }
    return common | _CONFIGS[options.kind](options)


def tensors(options: Options, tokenizer: TinyTokenizer, hot_biases: Biases) -> Tensors:
    """Every tensor of the checkpoint. hot_biases: what the hot experts get in each MoE layer; empty without skew."""
    result = {"model.embed_tokens.weight": embedding(options.vocab_size, options.hidden, _marks(options, tokenizer))}
    biases = dict(zip(moe_layers(options), hot_biases, strict=False))
    for layer in range(options.layers):
        hot = np.zeros(options.experts, dtype=np.float32)
        hot[list(options.hot)] = biases.get(layer, 0.0)
        of_layer = _LAYERS[options.kind](options, layer, hot)
        of_layer["input_layernorm.weight"] = ones(options.hidden)
        of_layer["post_attention_layernorm.weight"] = ones(options.hidden)
        result.update({f"model.layers.{layer}.{name}": tensor for name, tensor in of_layer.items()})
    result["model.norm.weight"] = ones(options.hidden)
    result["lm_head.weight"] = output_head(
        options.vocab_size, options.hidden, tokenizer.spoken, _answers(options, tokenizer)
    )
    return result


def _marks(options: Options, tokenizer: TinyTokenizer) -> dict[int, list[int]]:
    marks = {}
    if options.reply_tokens:
        # The tokens that end a reply are the rarest in text, so that hardly a prompt ends with one.
        marks[ENDER] = tokenizer.spoken[-max(1, round(len(tokenizer.spoken) / options.reply_tokens)) :]
    if options.has_harmony:
        chain = (HARMONY_ASSISTANT, tokenizer.special["<|channel|>"], HARMONY_FINAL)
        marks |= {CHAIN.start + link: [token] for link, token in enumerate(chain)}
    return marks


def _answers(options: Options, tokenizer: TinyTokenizer) -> dict[int, int]:
    answers = {ENDER: tokenizer.end}
    if options.has_harmony:
        chain = (tokenizer.special["<|channel|>"], HARMONY_FINAL, tokenizer.special["<|message|>"])
        answers |= {CHAIN.start + link: token for link, token in enumerate(chain)}
    return answers


def _expert_std(options: Options) -> float:
    """What one expert adds, so that the weighted sum of top-k adds about BLOCK_STD."""
    return BLOCK_STD * math.sqrt(options.top_k)


# gpt-oss: biases everywhere, attention sinks, sliding window in every other layer, clamped SwiGLU.


def _gpt_oss_config(options: Options) -> dict[str, Any]:
    layer_types = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(options.layers)]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_key_value_heads": options.key_value_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": options.intermediate,
        "num_local_experts": options.experts,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": layer_types,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": options.max_positions // 32,
        },
    }


def _gpt_oss_layer(options: Options, layer: int, hot: Floats) -> Tensors:
    hidden, inner, experts = options.hidden, options.intermediate, options.experts
    query, key = options.heads * HEAD_DIM, options.key_value_heads * HEAD_DIM
    down_std = _expert_std(options) / CLAMPED_MLP_STD / math.sqrt(inner)
    return {
        "self_attn.q_proj.weight": reads(query, hidden, QUERY_STD),
        "self_attn.q_proj.bias": Tensor((query,), BIAS_STD),
        "self_attn.k_proj.weight": reads(key, hidden),
        "self_attn.k_proj.bias": Tensor((key,), BIAS_STD),
        "self_attn.v_proj.weight": reads(key, hidden),
        "self_attn.v_proj.bias": Tensor((key,), BIAS_STD),
        "self_attn.o_proj.weight": writes(hidden, query, BLOCK_STD),
        "self_attn.o_proj.bias": Tensor((hidden,), BIAS_STD, finish=no_reserved_columns),
        "self_attn.sinks": Tensor((options.heads,), 1.0),
        "mlp.router.weight": router(experts, hidden),
        "mlp.router.bias": _constant(hot),
        "mlp.experts.gate_up_proj": Tensor((experts, hidden, 2 * inner), 1 / math.sqrt(hidden)),
        "mlp.experts.gate_up_proj_bias": Tensor((experts, 2 * inner), BIAS_STD),
        "mlp.experts.down_proj": Tensor((experts, inner, hidden), down_std, finish=no_reserved_columns),
        "mlp.experts.down_proj_bias": Tensor((experts, hidden), BIAS_STD, finish=no_reserved_columns),
    }


# DeepSeek V3: latent attention, a dense first layer, a shared expert, sigmoid scores with a bias, grouped top-k.


def _deepseek_config(options: Options) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": options.heads,
        "intermediate_size": 2 * options.intermediate,
        "moe_intermediate_size": options.intermediate,
        "n_routed_experts": options.experts,
        "n_shared_experts": 1,
        "n_group": options.expert_groups,
        "topk_group": options.chosen_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": ROUTED_SCALING,
        "first_k_dense_replace": DENSE_LAYERS,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "kv_lora_rank": KV_LORA,
        "qk_rope_head_dim": ROPE_DIM,
        "qk_nope_head_dim": NOPE_DIM,
        "v_head_dim": V_DIM,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _deepseek_layer(options: Options, layer: int, hot: Floats) -> Tensors:
    hidden, inner = options.hidden, options.intermediate
    attention = {
        "self_attn.q_proj.weight": reads(options.heads * (NOPE_DIM + ROPE_DIM), hidden, QUERY_STD),
        "self_attn.kv_a_proj_with_mqa.weight": reads(KV_LORA + ROPE_DIM, hidden),
        "self_attn.kv_a_layernorm.weight": ones(KV_LORA),
        "self_attn.kv_b_proj.weight": reads(options.heads * (NOPE_DIM + V_DIM), KV_LORA),
        "self_attn.o_proj.weight": writes(hidden, options.heads * V_DIM, BLOCK_STD),
    }
    if layer not in moe_layers(options):
        return attention | _silu_mlp("mlp", hidden, 2 * inner, BLOCK_STD)
    return attention | {
        "mlp.gate.weight": router(options.experts, hidden),
        "mlp.gate.e_score_correction_bias": _constant(hot),
        **_silu_mlp("mlp.shared_experts", hidden, inner, BLOCK_STD),
        **_silu_experts(options, _expert_std(options) / ROUTED_SCALING),
    }


# Qwen3 MoE: norms on queries and keys; the router has no bias, so the hot ones are pushed along the constant dimension.


def _qwen3_config(options: Options) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_key_value_heads": options.key_value_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": options.intermediate,
        "moe_intermediate_size": options.intermediate,
        "num_experts": options.experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }


def _qwen3_layer(options: Options, layer: int, hot: Floats) -> Tensors:
    hidden = options.hidden
    query, key = options.heads * HEAD_DIM, options.key_value_heads * HEAD_DIM
    return {
        "self_attn.q_proj.weight": reads(query, hidden),
        "self_attn.k_proj.weight": reads(key, hidden),
        "self_attn.v_proj.weight": reads(key, hidden),
        "self_attn.q_norm.weight": Tensor((HEAD_DIM,), 0.0, QUERY_STD),
        "self_attn.k_norm.weight": ones(HEAD_DIM),
        "self_attn.o_proj.weight": writes(hidden, query, BLOCK_STD),
        "mlp.gate.weight": router(options.experts, hidden, push=hot),
        **_silu_experts(options, _expert_std(options)),
    }


def _silu_experts(options: Options, out_std: float) -> Tensors:
    result: Tensors = {}
    for expert in range(options.experts):
        result |= _silu_mlp(f"mlp.experts.{expert}", options.hidden, options.intermediate, out_std)
    return result


def _silu_mlp(prefix: str, hidden: int, inner: int, out_std: float) -> Tensors:
    return {
        f"{prefix}.gate_proj.weight": reads(inner, hidden),
        f"{prefix}.up_proj.weight": reads(inner, hidden),
        f"{prefix}.down_proj.weight": writes(hidden, inner, out_std, SILU_MLP_STD),
    }


def _constant(values: Floats) -> Tensor:
    return Tensor(values.shape, 0.0, finish=lambda array: np.copyto(array, values))


_CONFIGS: dict[Kind, Callable[[Options], dict[str, Any]]] = {
    Kind.GPT_OSS: _gpt_oss_config,
    Kind.DEEPSEEK: _deepseek_config,
    Kind.QWEN3: _qwen3_config,
}
_LAYERS: dict[Kind, Callable[[Options, int, Floats], Tensors]] = {
    Kind.GPT_OSS: _gpt_oss_layer,
    Kind.DEEPSEEK: _deepseek_layer,
    Kind.QWEN3: _qwen3_layer,
}
