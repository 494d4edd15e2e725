"""Mixture-of-experts classifier heads; the analyses and the Lightning side live in the sub-packages."""

from pathlib import Path

_here = Path(__file__).resolve().parent
# Started in the root of a source tree, Python finds this folder before an installed wheel, and the two sub-packages
# lie beside it instead of inside it: look there too.
if not (_here / "callbacks").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))

from moe_heads.capacity import Capacity, capacity, match_capacity  # noqa: E402
from moe_heads.dense import Dense  # noqa: E402
from moe_heads.head import Head, HeadOutput  # noqa: E402
from moe_heads.routing import Router, Routing, RoutingStats, collect_routing  # noqa: E402
from moe_heads.soft_moe import SoftMoE  # noqa: E402
from moe_heads.sparse_moe import SparseMoE  # noqa: E402

__all__ = [
    "Capacity",
    "Dense",
    "Head",
    "HeadOutput",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftMoE",
    "SparseMoE",
    "capacity",
    "collect_routing",
    "match_capacity",
]
