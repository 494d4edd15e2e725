"""Choices of a router as indices: which experts run for a row, and by how much the scores decided it.

Shapes: N rows, E experts, K choices per row. Where choices may be dropped, the index E stands for a dropped one.
"""

import torch
from torch import Tensor

__all__ = ["consistent_rows", "highest", "lowest", "margin_of_choices", "spread", "sum_by_expert", "surplus_of_choices"]

# Rounding error of a score in units of the last place of the largest one: the router may have computed it another way.
_ROUNDING = 8


def spread(values: Tensor, indices: Tensor, num_experts: int, drops: bool) -> Tensor:
    """Scatter the values of the choices (N, K) to all experts, (N, E), with zeros elsewhere."""
    zeros = values.new_zeros(len(indices), num_experts + drops)
    spread_out = zeros.scatter(-1, indices, values)
    return spread_out[:, :num_experts] if drops else spread_out


def sum_by_expert(values: Tensor, indices: Tensor, num_experts: int, drops: bool) -> Tensor:
    """Sum the values of the choices (N, K) by expert, (E,)."""
    sums = values.new_zeros(num_experts + drops).index_add_(0, indices.flatten(), values.flatten())
    return sums[:num_experts] if drops else sums


def margin_of_choices(scores: Tensor, indices: Tensor, drops: bool) -> Tensor:
    """Return the lowest chosen score minus the highest other one, (N,), infinite if all experts are chosen.

    A dropped choice is one of the K highest scores, whichever expert it was.
    """
    if drops:
        num_choices = indices.shape[-1]
        if num_choices == scores.shape[-1]:
            return torch.where(scores.isnan().any(-1), torch.nan, torch.inf).to(scores.dtype)
        ranked = scores.topk(num_choices + 1, dim=-1).values
        return ranked[:, -2] - ranked[:, -1]
    # masks over all experts would be slower
    return scores.gather(-1, indices).amin(-1) - scores.scatter(-1, indices, -torch.inf).amax(-1)


def surplus_of_choices(scores: Tensor, indices: Tensor, drops: bool) -> Tensor:
    """Return the lowest score of the choices that were kept minus what it takes to be among the K highest, (N,)."""
    if not drops:
        return margin_of_choices(scores, indices, drops=False)
    padded = torch.cat([scores, scores.new_full((len(scores), 1), torch.inf)], -1)
    return padded.gather(-1, indices).amin(-1) - scores.topk(indices.shape[-1], dim=-1).values[:, -1]


def consistent_rows(scores: Tensor, indices: Tensor, drops: bool) -> Tensor:
    """Return the rows (N,), bool, whose choices are among their K highest scores (N, E), up to rounding."""
    if not len(scores):
        return torch.ones(0, dtype=torch.bool, device=scores.device)
    tolerance = _ROUNDING * torch.finfo(scores.dtype).eps
    largest = torch.where(scores.isfinite(), scores, 0).abs().amax()
    return surplus_of_choices(scores, indices, drops) >= -tolerance * largest


def lowest(scores: Tensor, among: Tensor, dim: int) -> Tensor:
    """Return the lowest of the scores in a mask, infinity where there is none."""
    return torch.where(among, scores, torch.inf).amin(dim, keepdim=True)


def highest(scores: Tensor, among: Tensor, dim: int) -> Tensor:
    """Return the highest of the scores in a mask, minus infinity where there is none."""
    return torch.where(among, scores, -torch.inf).amax(dim, keepdim=True)
