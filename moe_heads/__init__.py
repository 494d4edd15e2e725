"""Mixture-of-experts heads and layers. The analyses and the Lightning integration are in the subpackages."""

from moe_heads.capacity import Capacity, capacity, match_capacity
from moe_heads.dense import Dense
from moe_heads.flops import Flops
from moe_heads.head import Head, HeadOutput
from moe_heads.moe_layer import LayerOutput, MoELayer
from moe_heads.replacement import replace_mlp
from moe_heads.routing import Router, Routing, RoutingStats, collect_routing, fixed_routing
from moe_heads.soft_moe import SoftMoE
from moe_heads.sparse_mixture import NOISY_TOP_K
from moe_heads.sparse_moe import SparseMoE
from moe_heads.surgery import ablate, upcycle

__all__ = [
    "NOISY_TOP_K",
    "Capacity",
    "Dense",
    "Flops",
    "Head",
    "HeadOutput",
    "LayerOutput",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftMoE",
    "SparseMoE",
    "ablate",
    "capacity",
    "collect_routing",
    "fixed_routing",
    "match_capacity",
    "replace_mlp",
    "upcycle",
]
