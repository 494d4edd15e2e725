"""A symmetric operator in scaled coordinates."""

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["ScaledOperator"]


class ScaledOperator:
    """The matrix S H S of a symmetric matrix H and a diagonal matrix S. A product costs one with H.

    Args:
        operator: H.
        scale: Diagonal of S, (P,), on the device of the operator and in its data type.

    Raises:
        ValueError: If the scale has another shape, or an entry is not finite and above 0.
    """

    num_strata = 1

    def __init__(self, operator: SymmetricOperator, scale: Tensor) -> None:
        if scale.shape != operator.shape[:1] or not bool((scale > 0).all() and scale.isfinite().all()):
            raise ValueError(
                f"scale: expected {operator.shape[0]} finite numbers above 0, got shape {tuple(scale.shape)} with"
                f" values from {float(scale.min()):.3g} to {float(scale.max()):.3g}."
            )
        self._operator, self._scale = operator, scale
        self.dtype, self.device, self.shape = operator.dtype, operator.device, operator.shape
        self.forms, self.stratum_weights = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product with a vector (P,)."""
        product = self._operator.matvec(vector * self._scale).mul_(self._scale)
        self.forms = self._operator.forms.sum(0, keepdim=True)
        return product
