"""Path that runs every expert on every row, weighted by the gates: static shapes, no branch, no synchronization."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["mix_all", "sum_all"]


def mix_all(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Compute the weighted sum of the experts (N, C) for the rows x (N, D)."""
    return sum_all(experts, x, routing.gates, some_closed=not routing.soft)


def sum_all(experts: Experts, x: Tensor, gates: Tensor | None = None, some_closed: bool = False) -> Tensor:
    """Sum all experts (N, C) for the rows x (N, D), weighted by the gates (N, E), as two matrix products.

    The gates scale the hidden units, so that the second product sums over experts and units at once. With
    ``some_closed`` a gate of zero also excludes an expert whose hidden units are not finite.
    """
    weight1, bias1, weight2, bias2 = experts.stacks()
    num_experts, width, _ = weight1.shape
    hidden = experts.activate(F.linear(x, weight1.flatten(0, 1), bias1.flatten()))
    second = weight2.transpose(1, 2).flatten(0, 1).to(hidden.dtype)
    if gates is None:
        return torch.addmm(bias2.sum(0).to(hidden.dtype), hidden, second)
    gates = gates.to(hidden.dtype)
    each, gate = hidden.view(-1, num_experts, width), gates.unsqueeze(-1)
    weighted = torch.where(gate == 0, 0, each * gate) if some_closed else each * gate
    return torch.addmm(gates @ bias2.to(hidden.dtype), weighted.view(hidden.shape), second)
