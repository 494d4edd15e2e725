"""Estimate of the largest eigenvalue from an interrupted product."""

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.iteration import KrylovIteration
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.weighted_sum import InterruptedProduct

__all__ = ["first_value"]


class _OneProduct:
    """An operator with one known product."""

    num_strata = 1

    def __init__(self, interrupted: InterruptedProduct, dim: int) -> None:
        self._product = interrupted.sums[:dim]
        self.shape, self.dtype, self.device = (dim, dim), self._product.dtype, self._product.device
        self.stratum_weights = torch.ones(1, dtype=torch.float64)
        self.forms = torch.zeros(1, dtype=torch.float64)

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product with the vector of the interrupted product."""
        return self._product.clone()


def first_value(interrupted: InterruptedProduct, tolerance: float) -> LanczosResult:
    """Return the result of one Lanczos step on the samples with finished products.

    Args:
        interrupted: The product of the first samples.
        tolerance: Tolerance of the result.
    """
    dim = len(interrupted.vector)
    iteration = KrylovIteration(_OneProduct(interrupted, dim), torch.Generator(), 1, tolerance, dim, interrupted.vector)
    iteration.step()
    return iteration.result(is_complete=False)
