"""Tiny language models with experts, with random weights: their configurations are in transformers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOP2 = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GROUPS = {**_TOP2, "n_routed_experts": 8, "first_k_dense_replace": 0}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

# the configurations are dataclasses for mypy, but take the arguments of their models as well
_hf: Any = transformers

_CONFIGS: Mapping[str, Callable[[], Any]] = {
    "Mixtral": lambda: _hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "Olmoe": lambda: _hf.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "Qwen3Moe": lambda: _hf.Qwen3MoeConfig(**SIZES, **_TOP2, num_experts=8, head_dim=8),
    "DeepseekV3": lambda: _hf.DeepseekV3Config(**SIZES, **_GROUPS, **_LATENT, n_group=4, topk_group=2),
    "DeepseekV2": lambda: _hf.DeepseekV2Config(
        **SIZES, **_GROUPS, **_LATENT, n_group=4, topk_group=2, topk_method="group_limited_greedy"
    ),
    "GptOss": lambda: _hf.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=16, rope_scaling=None
    ),
    "Glm4Moe": lambda: _hf.Glm4MoeConfig(**SIZES, **_GROUPS, n_group=2, topk_group=1, head_dim=8),
    "Llama4": lambda: _hf.Llama4TextConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    ),
    "GraniteMoe": lambda: _hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "JetMoe": lambda: _hf.JetMoeConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, kv_channels=8, activation_function="silu"
    ),
    "Ernie4_5_Moe": lambda: _hf.Ernie4_5_MoeConfig(
        **SIZES, **_TOP2, moe_num_experts=8, moe_k=2, moe_layer_start_index=0
    ),
    "MiniMaxM2": lambda: _hf.MiniMaxM2Config(
        **SIZES, num_local_experts=8, num_experts_per_tok=2, head_dim=8, rotary_dim=4
    ),
    "Phimoe": lambda: _hf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "Dbrx": lambda: _hf.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=VOCABULARY,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ),
    "SwitchTransformers": lambda: _hf.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=4,
        expert_capacity=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    ),
}

NAMES = tuple(_CONFIGS)


def language_model(name: str) -> nn.Module:
    """Build a tiny model with weights that are large enough for uneven loads."""
    torch.manual_seed(0)
    config = _CONFIGS[name]()
    if config.is_encoder_decoder:
        model = _hf.SwitchTransformersForConditionalGeneration(config)
    else:
        model = _hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.normal_(0, 0.05)
    return model.eval()


def tokens(model: nn.Module, num_samples: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Return a batch of random tokens for a model."""
    ids = torch.randint(3, VOCABULARY, (num_samples, length))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "labels": torch.randint(3, VOCABULARY, (num_samples, length - 3))}
    return {"input_ids": ids, "labels": ids}
