"""Dispatch: execution paths for the experts that a routing chose, all with the same result.

Shapes of this package: N rows, D features, E experts, H expert width, C classes, K choices per row, P choices in total.
"""

from moe_heads.dispatch.all_experts import sum_all
from moe_heads.dispatch.choice import Dispatch, keep_outside_the_graph, mix
from moe_heads.dispatch.stages import stages

__all__ = ["Dispatch", "keep_outside_the_graph", "mix", "stages", "sum_all"]
