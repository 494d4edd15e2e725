"""Dispatch: the ways to run the experts that a routing chose; few paths, one result.

Shapes of this package: N rows, D features, E experts, H expert width, C classes, K choices a row, P choices in all.
"""

from moe_heads.dispatch.all_experts import sum_all
from moe_heads.dispatch.choice import Dispatch, mix
from moe_heads.dispatch.stages import stages

__all__ = ["Dispatch", "mix", "stages", "sum_all"]
