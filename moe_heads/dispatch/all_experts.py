"""Path that runs every expert on every row: static shapes, no branch on values, no synchronization."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["combine_chosen", "mix_all", "sum_all", "sums_chosen"]


def mix_all(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Compute the weighted sum of the experts (N, C) for the rows x (N, D)."""
    if sums_chosen(experts, routing):
        return _sum_chosen(experts, x, routing)
    return sum_all(experts, x, routing.gates, some_closed=not routing.soft)


def sums_chosen(experts: Experts, routing: Routing) -> bool:
    """Return whether `mix_all` sums the chosen logits after the second layer, instead of masking the hidden units.

    A mask over all hidden units takes longer than the second product. The logits of all experts need more memory only
    if there are many classes.
    """
    return routing.indices is not None and experts.out_features <= 2 * experts.width


def sum_all(experts: Experts, x: Tensor, gates: Tensor | None = None, some_closed: bool = False) -> Tensor:
    """Sum all experts (N, C) for the rows x (N, D), weighted by the gates (N, E), as two matrix products.

    The gates scale the hidden units, so that the second product sums over experts and units at once. With
    ``some_closed`` a gate of zero also excludes an expert whose hidden units are not finite.
    """
    weight1, bias1, weight2, bias2 = experts.stacks()
    hidden = experts.activate(F.linear(x, weight1.flatten(0, 1), experts.fc1.bias))
    # copies whole rows of units, and nothing if there is one expert
    second = weight2.transpose(0, 1).flatten(1).to(hidden.dtype)
    if gates is None:
        return F.linear(hidden, second, bias2.sum(0).to(hidden.dtype))
    gates = gates.to(hidden.dtype)
    each, gate = hidden.view(-1, *bias1.shape), gates.unsqueeze(-1)
    weighted = torch.where(gate == 0, 0, each * gate) if some_closed else each * gate
    return torch.addmm(gates @ bias2.to(hidden.dtype), weighted.view(hidden.shape), second.t())


def _sum_chosen(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Run all experts, and sum the logits of the chosen ones."""
    weight1, bias1, weight2, bias2 = experts.stacks()
    hidden = experts.activate(F.linear(x, weight1.flatten(0, 1), experts.fc1.bias))
    dtype = hidden.dtype
    each = hidden.view(-1, *bias1.shape).transpose(0, 1)
    logits = torch.baddbmm(bias2.to(dtype).unsqueeze(1), each, weight2.to(dtype).transpose(1, 2))
    return combine_chosen(logits, routing)


def combine_chosen(logits: Tensor, routing: Routing) -> Tensor:
    """Sum the logits (E, N, C) of the chosen experts by the weights, (N, C)."""
    assert routing.indices is not None and routing.weights is not None
    index = routing.indices.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    chosen = logits.transpose(0, 1).gather(1, index)
    return torch.bmm(routing.weights.to(logits.dtype).unsqueeze(1), chosen).squeeze(1)
