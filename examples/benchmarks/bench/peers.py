"""Layers of other libraries with the sizes of our heads.

Create a folder for ``--peers`` with

    uv pip install --target FOLDER --no-deps st-moe-pytorch soft-moe-pytorch colt5-attention beartype einops \
        local-attention hyper-connections
    git clone https://github.com/davidmrau/mixture-of-experts FOLDER/davidmrau

`transformers` is installed by ``pip install .[dev]``.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from moe_heads import NOISY_TOP_K, SoftMoE, SparseMoE

__all__ = ["behind_router", "davidmrau", "feature_layers", "token_layers"]

Layers = dict[str, Callable[[Tensor], object]]


def davidmrau(
    folder: Path, in_features: int, num_classes: int, num_experts: int, width: int, k: int
) -> Callable[[Tensor], object]:
    """Build ``MoE`` of davidmrau/mixture-of-experts, whose experts end in a softmax and whose gate has no bias."""
    layer: nn.Module = _load(folder / "davidmrau" / "moe.py").MoE(in_features, num_classes, num_experts, width, k=k)
    # zeros would route every row to the same experts
    nn.init.normal_(layer.get_parameter("w_gate"), std=in_features**-0.5)
    return layer.eval()


def feature_layers(in_features: int, num_experts: int, width: int, k: int) -> Layers:
    """Build layers of features (B, D) to (B, D): our head, and transformers' experts with our router."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    head = SparseMoE(in_features, in_features, num_experts, width, k, **NOISY_TOP_K).eval()
    layers: Layers = {
        "ours": head,
        "transformers_batched_mm": behind_router(head, batched_mm_experts_forward),
        "transformers_grouped_mm": behind_router(head, grouped_mm_experts_forward),
    }
    x = torch.randn(16, in_features)
    with torch.inference_mode():
        for layer in layers.values():
            torch.testing.assert_close(layer(x), head(x), rtol=1e-3, atol=1e-4)
    return layers


def behind_router(head: SparseMoE, forward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function (B, D) to (B, C) that runs an expert function of transformers after the router of a head."""
    adapter = _TransformersExperts(head)

    def call(x: Tensor) -> Tensor:
        routing = head.router(x)
        return forward(adapter, x, routing.indices, routing.weights)

    return call


def token_layers(in_features: int, num_experts: int, width: int, k: int) -> Layers:
    """Build layers of tokens (B, T, D): lucidrains' st-moe (with dropped tokens) and soft-moe, and our heads.

    Their layers return tokens, soft-moe after norms. Our heads average the logits of the tokens, `SoftMoE` before the
    last product.
    """
    from soft_moe_pytorch import SoftMoE as LucidrainsSoftMoE
    from st_moe_pytorch import MoE

    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, in_features))

    st_moe = MoE(in_features, num_experts, gating_top_n=k, experts=nn.ModuleList(expert() for _ in range(num_experts)))
    soft_moe = LucidrainsSoftMoE(in_features, num_experts=num_experts, num_slots=1, expert_mult=width / in_features)
    return {
        "ours_sparse": SparseMoE(in_features, in_features, num_experts, width, k, **NOISY_TOP_K).eval(),
        "st_moe": st_moe.eval(),
        "ours_soft": SoftMoE(in_features, in_features, num_experts, width).eval(),
        "soft_moe": soft_moe.eval(),
    }


class _TransformersExperts(nn.Module):
    """An adapter with the attributes that transformers' expert functions read, and the weights of a head."""

    has_gate, has_bias, is_transposed, has_post_expert_norm, _is_expert_parallel = False, True, False, False, False

    def __init__(self, head: SparseMoE) -> None:
        super().__init__()
        experts = head.experts
        self.num_experts = head.num_experts
        self.up_proj, self.up_proj_bias = experts.fc1.weight, experts.fc1.bias_by_expert
        self.down_proj, self.down_proj_bias = experts.fc2.weight, experts.fc2.bias_by_expert
        self.act_fn = nn.ReLU()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("davidmrau_moe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
