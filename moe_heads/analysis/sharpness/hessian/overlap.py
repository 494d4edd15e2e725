"""Overlap of the spaces that two sets of eigenvectors span."""

import torch
from torch import Tensor

__all__ = ["subspace_overlap"]


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    r"""Return the overlap :math:`\|V W^T\|_F^2 / k` of two spaces, 0 for orthogonal and 1 for equal spaces.

    Two random spaces of dimension k have an overlap of k / P on average.

    Args:
        first: V, orthonormal rows, (k, P).
        second: W, of the same shape.

    Raises:
        ValueError: If the shapes differ.

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
