"""Routers: modules that assign rows to experts with mixing weights.

Each maps rows (N, D) to a `moe_heads.Routing` and can be passed as ``SparseMoE(..., router=...)``. A new one derives
from `LinearRouter`, or from `moe_heads.Router` (routing/router.py) if its gate is not linear.
"""

from moe_heads.routers.bias_balanced import BiasBalancedRouter
from moe_heads.routers.expert_choice import ExpertChoiceRouter
from moe_heads.routers.linear import LinearRouter, linear_fp32
from moe_heads.routers.noisy_top_k import NoisyTopKRouter
from moe_heads.routers.softmax import SoftmaxRouter
from moe_heads.routers.switch import SwitchRouter

__all__ = [
    "BiasBalancedRouter",
    "ExpertChoiceRouter",
    "LinearRouter",
    "NoisyTopKRouter",
    "SoftmaxRouter",
    "SwitchRouter",
    "linear_fp32",
]
