"""Decisions of a router for a batch, their statistics, and their collection and replay in any model."""

from moe_heads.routing.adapters import Adapters, RoutingAdapter, adapted_routers, named_routers
from moe_heads.routing.collection import RoutingCollection, collect_routing
from moe_heads.routing.fixed import fixed_routing
from moe_heads.routing.loss_watch import LossWatch
from moe_heads.routing.router import Router
from moe_heads.routing.routing import BALANCE_TERMS, Routing
from moe_heads.routing.stats import RoutingStats, map_packed

__all__ = [
    "BALANCE_TERMS",
    "Adapters",
    "LossWatch",
    "Router",
    "Routing",
    "RoutingAdapter",
    "RoutingCollection",
    "RoutingStats",
    "adapted_routers",
    "collect_routing",
    "fixed_routing",
    "map_packed",
    "named_routers",
]
