"""Tiny random MoE models of transformers, and blocks as people write them, with a plain loop over their experts.

Shapes: N rows, D features, E experts.
"""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.language_models import SIZES, VOCABULARY

__all__ = ["FUSED", "SEPARATE", "GateAndList", "input_ids", "routers_of", "run", "swiglu_of"]

_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def _causal(config: object) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


FUSED: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: _causal(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    "olmoe": lambda: _causal(transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: _causal(
        transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    ),
    "llama4": lambda: _causal(
        transformers.Llama4TextConfig(
            **SIZES, num_local_experts=4, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1
        )
    ),
    "deepseek_v3": lambda: _causal(transformers.DeepseekV3Config(**SIZES, **_DEEPSEEK)),
}
"""Models whose experts are one module."""

_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "num_experts": 4, "expert_capacity": 64}


def _switch() -> nn.Module:
    sparse = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**_T5, **sparse, d_kv=8, d_ff=48, num_heads=4)
    return transformers.SwitchTransformersModel(config).eval()


def _nllb() -> nn.Module:
    heads = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _NLLB.items()}
    return transformers.NllbMoeModel(transformers.NllbMoeConfig(**_T5, **heads)).eval()


_NLLB = {"layers": 1, "attention_heads": 4, "ffn_dim": 48, "sparse_step": 1}

SEPARATE: dict[str, Callable[[], nn.Module]] = {"switch": _switch, "nllb": _nllb}
"""Models whose experts are modules of their own."""


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers of transformers in a model, by their path."""
    return {path: module for path, module in model.named_modules() if type(module).__name__.endswith("Router")}


def input_ids(num_samples: int = 2, num_tokens: int = 10) -> Tensor:
    return torch.randint(3, VOCABULARY, (num_samples, num_tokens))


def run(model: nn.Module, ids: Tensor) -> None:
    """Run a model of this file on tokens."""
    decoder = (
        {"decoder_input_ids": ids}
        if isinstance(model.config, transformers.PreTrainedConfig) and (model.config.is_encoder_decoder)
        else {}
    )
    model(input_ids=ids, **decoder)


def swiglu_of(experts: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """Compute one expert of transformers from its weights, (N, D), as a loop over matrices.

    Llama 4 stores its second matrix as (hidden, D), and the others as (D, hidden). Only GPT-OSS has biases.
    """
    first, second = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):
        hidden = rows @ first + experts.gate_up_proj_bias[expert]
        gate, up = hidden[:, ::2].clamp(max=experts.limit), hidden[:, 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate) @ second + experts.down_proj_bias[expert]
    if second.shape[0] != rows.shape[1]:
        gate, up = (rows @ first).chunk(2, dim=1)
        return (up * F.silu(gate)) @ second
    gate, up = (rows @ first.T).chunk(2, dim=1)
    return (up * F.silu(gate)) @ second.T


class GateAndList(nn.Module):
    """Block with a linear gate and a list of experts, of which one runs on each row, in a plain loop.

    Args:
        scaled: Whether the mixing weight is applied to the input of an expert instead of its output.
    """

    def __init__(self, num_experts: int = 4, features: int = 6, scaled: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(features, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, features)) for _ in range(num_experts)
        )
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        weights, chosen = probs.max(-1)
        output = torch.zeros_like(x)
        for expert, module in enumerate(self.experts):
            mine = chosen == expert
            weight = weights[mine].unsqueeze(-1)
            output[mine] = module(weight * x[mine]) if self.scaled else weight * module(x[mine])
        return output
