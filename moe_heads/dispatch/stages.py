"""Overhead of a dispatch path apart from the arithmetic of the experts, as stages that can be timed separately."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_heads.dispatch.all_experts import combine_chosen, sums_chosen
from moe_heads.dispatch.assignments import assignments, combine
from moe_heads.dispatch.choice import Dispatch, path_of
from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["stages"]


def stages(experts: Experts, x: Tensor, routing: Routing, dispatch: Dispatch) -> Mapping[str, Callable[[], object]]:
    """Return functions for the work that the chosen path does before and after the experts.

    Args:
        experts: The experts.
        x: Rows, (N, D).
        routing: Their routing.
        dispatch: Name of a path, or "auto".

    Returns:
        "dispatch", which assigns and gathers the rows (or the weights), and "combine", which sums the logits of the
        choices. The path "all" has only the latter, or, if it sums inside its second product, scatters the gates.
    """
    path = path_of(experts, x, routing, dispatch)
    if path == "all" and sums_chosen(experts, routing):
        logits = x.new_zeros(experts.num_experts, len(x), experts.out_features)
        return {"combine": lambda: combine_chosen(logits, routing)}
    if path == "all":
        return {"dispatch": lambda: routing.gates}
    weights, indices = routing.weights, routing.indices
    assert weights is not None
    outputs = x.new_zeros(*weights.shape, experts.out_features)
    if path == "gathered":
        return {
            "dispatch": lambda: [stack[indices] for stack in experts.stacks()],
            "combine": lambda: (outputs * weights.unsqueeze(-1)).sum(1),
        }
    if path == "ragged" and x.shape[0] == 1 and indices is not None:
        return {
            "dispatch": indices.tolist,
            "combine": lambda: weights @ torch.cat([*outputs[0].split(1)]),
        }
    chosen = assignments(routing)
    return {
        "dispatch": lambda: _sorted_rows(experts, x, routing, reads_lengths=path == "ragged"),
        "combine": lambda: combine(outputs.flatten(0, 1), chosen, x.shape[0]),
    }


def _sorted_rows(experts: Experts, x: Tensor, routing: Routing, *, reads_lengths: bool) -> Tensor:
    chosen = assignments(routing)
    if reads_lengths:
        torch.bincount(chosen.experts, minlength=experts.num_experts).tolist()
    else:
        indices = torch.arange(experts.num_experts, device=x.device)
        torch.searchsorted(chosen.experts, indices, right=True, out_int32=True)
    return x.index_select(0, chosen.rows)
