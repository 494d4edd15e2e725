"""Every expert on every row, weighted by the gates: static shapes, no branch, no host synchronisation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["mix_all", "sum_all"]


def mix_all(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of the experts (N, C) for the rows x (N, D)."""
    return sum_all(experts, x, routing.gates)


def sum_all(experts: Experts, x: Tensor, gates: Tensor | None = None) -> Tensor:
    """Sum of all experts (N, C) for the rows x (N, D), weighted by the gates (N, E), as two matrix products.

    The gates scale the hidden units, so that the second product sums over experts and units at once.
    """
    hidden = experts.activate(F.linear(x, experts.weight1.flatten(0, 1), experts.bias1.flatten()))
    second = experts.weight2.transpose(1, 2).flatten(0, 1).to(hidden.dtype)
    if gates is None:
        return torch.addmm(experts.bias2.sum(0).to(hidden.dtype), hidden, second)
    gates = gates.to(hidden.dtype)
    weighted = hidden.unflatten(-1, (experts.num_experts, experts.width)) * gates.unsqueeze(-1)
    return torch.addmm(gates @ experts.bias2.to(gates.dtype), weighted.flatten(-2), second)
