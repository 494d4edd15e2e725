"""Sparse heads with every router, small and in float64 unless said otherwise."""

from collections.abc import Callable

import torch

from moe_heads import NOISY_TOP_K, SparseMoE
from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, NoisyTopKRouter, SoftmaxRouter, SwitchRouter

FEATURES, CLASSES, EXPERTS, WIDTH = 8, 3, 4, 16

ROUTERS: dict[str, Callable[[], object]] = {
    "noisy_top_k": lambda: None,
    "switch": lambda: SwitchRouter(FEATURES, EXPERTS),
    "bias_balanced": lambda: BiasBalancedRouter(FEATURES, EXPERTS, k=2),
    "expert_choice": lambda: ExpertChoiceRouter(FEATURES, EXPERTS, k=2),
    "softmax": lambda: SoftmaxRouter(FEATURES, EXPERTS),
    "normalized": lambda: NoisyTopKRouter(FEATURES, EXPERTS, k=2, normalize=True),
}


def head_with(name: str, dtype: torch.dtype = torch.float64, **options: object) -> SparseMoE:
    """A head in evaluation mode, without dropout and shared experts."""
    sizes = {"num_experts": EXPERTS, "expert_width": WIDTH, "num_shared_experts": 0}
    gate = NOISY_TOP_K if name == "noisy_top_k" else {"router": ROUTERS[name]()}
    defaults = {**sizes, "dropout": 0.0, **gate}
    return SparseMoE(FEATURES, CLASSES, **(defaults | options)).to(dtype).eval()
