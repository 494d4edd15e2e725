"""How far two sets of eigenvectors span the same space."""

import torch
from torch import Tensor

__all__ = ["subspace_overlap"]


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    r"""Overlap :math:`\|V W^T\|_F^2 / k` of two spaces, 0 for orthogonal ones and 1 for the same.

    Two random spaces of dimension k have k / P on average.

    Args:
        first: V, orthonormal rows, (k, P).
        second: W, the same.

    Raises:
        ValueError: If the shapes are not the same.

    Source:
        Gur-Ari, Roberts and Dyer, Gradient descent happens in a tiny subspace, 2018, arXiv 1812.04754.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import subspace_overlap
        >>> subspace_overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
        0.5
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(f"second: expected the shape of the first, {tuple(first.shape)}, got {tuple(second.shape)}")
    products = first @ second.to(first.device, first.dtype).T
    return float(products.square().sum(dtype=torch.float64)) / len(first)
