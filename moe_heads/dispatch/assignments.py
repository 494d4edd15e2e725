"""Choices of a routing in the order of the experts, for row choice and expert choice alike."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_heads.routing import Routing

__all__ = ["Assignments", "assignments", "combine"]


class Assignments(NamedTuple):
    """Choices of a routing, one entry each, sorted by expert.

    Attributes:
        experts: (P,), ascending.
        rows: (P,).
        weights: (P,).
    """

    experts: Tensor
    rows: Tensor
    weights: Tensor


def assignments(routing: Routing) -> Assignments:
    """Return the choices of a sparse routing, sorted by expert."""
    assert routing.weights is not None
    if routing.rows is not None:
        num_experts, num_rows = routing.rows.shape
        experts = torch.arange(num_experts, device=routing.rows.device).repeat_interleave(num_rows)
        return Assignments(experts, routing.rows.flatten(), routing.weights.flatten())
    assert routing.indices is not None
    experts, order = routing.indices.flatten().sort(stable=True)
    rows = order // routing.indices.shape[-1]
    return Assignments(experts, rows, routing.weights.flatten().index_select(0, order))


def combine(outputs: Tensor, chosen: Assignments, num_rows: int) -> Tensor:
    """Sum the weighted outputs (P, C) by row, (N, C), in the dtype of the outputs."""
    weighted = outputs * chosen.weights.unsqueeze(-1)
    total = weighted.new_zeros(num_rows, outputs.shape[-1]).index_add(0, chosen.rows, weighted)
    return total.to(outputs.dtype)
