"""The experts as one grouped matrix product over the rows sorted by expert: static shapes, no host synchronisation.

For many rows under torch.compile. `torch.nn.functional.grouped_mm` has no bias and no forward-mode derivative.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from moe_heads.dispatch.assignments import assignments, combine
from moe_heads.experts import Experts
from moe_heads.routing import Routing

__all__ = ["mix_grouped", "why_not_grouped"]

_ALIGNMENT_BYTES = 16


def mix_grouped(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of the chosen experts (N, C) for the rows x (N, D)."""
    chosen = assignments(routing)
    dtype = _dtype(x)
    indices = torch.arange(experts.num_experts, device=x.device)
    ends = torch.searchsorted(chosen.experts, indices, right=True, out_int32=True)
    weight1, bias1, weight2, bias2 = (
        parameter.to(dtype) for parameter in (experts.weight1, experts.bias1, experts.weight2, experts.bias2)
    )
    rows = x.to(dtype).index_select(0, chosen.rows)
    hidden = F.grouped_mm(rows, weight1.transpose(1, 2), offs=ends) + bias1.index_select(0, chosen.experts)
    # the strides of an operand and of its gradient have to be multiples of 16 bytes: zero classes fill up
    padding = -experts.out_features % (_ALIGNMENT_BYTES // dtype.itemsize)
    outputs = F.grouped_mm(experts.activate(hidden), F.pad(weight2, (0, 0, 0, padding)).transpose(1, 2), offs=ends)
    outputs = outputs[:, : experts.out_features] + bias2.index_select(0, chosen.experts)
    return combine(outputs, chosen, len(x))


def why_not_grouped(experts: Experts, x: Tensor) -> str | None:
    """What keeps the grouped product from serving these experts and rows; None if nothing does."""
    dtype = _dtype(x)
    if dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        return f"expected fp32, bf16 or fp16; got {dtype}"
    multiple = _ALIGNMENT_BYTES // dtype.itemsize
    if experts.in_features % multiple or experts.width % multiple:
        return (
            f"expected in_features and expert_width to be multiples of {multiple} in {dtype}; got"
            f" {experts.in_features} and {experts.width}"
        )
    if forward_ad._current_level >= 0:
        return "expected no forward-mode derivative, which grouped_mm does not have; got one"
    return None


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
