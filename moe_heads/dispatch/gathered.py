"""Path that gathers the weights of the chosen experts for each row: static shapes, and it reads only those experts.

It is for few rows under torch.compile, which fuses the gathering into the products and copies nothing.
"""

import torch
from torch import Tensor

from moe_heads.experts import Experts
from moe_heads.precision import compute_dtype
from moe_heads.routing import Routing

__all__ = ["mix_gathered"]


def mix_gathered(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Compute the weighted sum of the chosen experts (N, C) for the rows x (N, D)."""
    indices, weights = routing.indices, routing.weights
    assert indices is not None and weights is not None
    dtype = compute_dtype(x)
    x = x.to(dtype)
    # the gradient of a weight is a sum over the rows that chose it, which half precision does not hold
    wide = torch.promote_types(experts.fc1.weight.dtype, torch.float32) if torch.is_grad_enabled() else None
    stacks = (stack if wide is None else stack.to(wide) for stack in experts.stacks())
    weight1, bias1, weight2, bias2 = (stack[indices].to(dtype) for stack in stacks)
    # products and sums instead of batched matrix products: the compiler fuses them with the gathering into one loop
    hidden = experts.activate((x[:, None, None, :] * weight1).sum(-1) + bias1)
    logits = (hidden.unsqueeze(-2) * weight2).sum(-1) + bias2
    return (logits * weights.to(dtype).unsqueeze(-1)).sum(1)
