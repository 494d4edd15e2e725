"""Networks of the tests of weight matching, by the name of their head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import NOISY_TOP_K, Dense, MoELayer, SoftMoE, SparseMoE
from moe_heads.analysis import analysis_mode
from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis.weight_matching.function import permuted
from moe_heads.analysis.weight_matching.tensors import tensors_of
from moe_heads.analysis.weight_matching.tracing import find_groups
from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, NoisyTopKRouter, SoftmaxRouter, SwitchRouter


def heads(features: int) -> dict[str, Callable[[], nn.Module]]:
    """Heads of every kind, and a sparse head with every router, for 3 classes."""

    def sparse(router: type, **options: object) -> Callable[[], nn.Module]:
        return lambda: SparseMoE(
            features, 3, num_experts=3, expert_width=4, router=router(features, 3, **options), num_shared_experts=2
        )

    return {
        "dense": lambda: Dense(features, 3, width=7),
        "soft": lambda: SoftMoE(features, 3, num_experts=3, expert_width=4),
        "soft with slots": lambda: SoftMoE(features, 3, num_experts=3, expert_width=4, slots_per_expert=2),
        "sparse": lambda: SparseMoE(features, 3, num_experts=3, expert_width=4),
        "noisy": lambda: SparseMoE(features, 3, num_experts=3, expert_width=4, **NOISY_TOP_K),
        "top k": sparse(NoisyTopKRouter, k=2),
        "softmax": sparse(SoftmaxRouter),
        "switch": sparse(SwitchRouter),
        "expert choice": sparse(ExpertChoiceRouter),
        "bias balanced": sparse(BiasBalancedRouter),
        "layer": lambda: nn.Sequential(
            MoELayer(features, 5, num_experts=3, expert_width=4), nn.Tanh(), nn.Linear(5, 3)
        ),
    }


def scatter(model: nn.Module) -> nn.Module:
    """Give every parameter and floating-point buffer values of its own, as training would; evaluation mode."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
        elif name.endswith("bias_steps"):
            buffer.copy_(torch.arange(len(buffer)))
    return model.eval()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def permute_randomly(model: nn.Module, loss_fn: LossFn, batch: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return parameters and buffers of a model under random permutations that do not change its function."""
    with analysis_mode(model, seed):
        groups = find_groups(model, loss_fn, batch)
    generator = torch.Generator().manual_seed(seed)
    return permuted(groups, tensors_of(model), {group.name: group.random(generator) for group in groups})
