"""A diagonal block of a symmetric operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["DiagonalBlock"]


class DiagonalBlock:
    """Diagonal block of a symmetric matrix for some places of its vectors. A product costs one with the whole matrix.

    Args:
        operator: The whole matrix.
        places: Slices of its vectors, without overlap.
    """

    num_strata = 1

    def __init__(self, operator: SymmetricOperator, places: Sequence[slice]) -> None:
        self._operator, self._places = operator, places
        self._size = sum(place.stop - place.start for place in places)
        self.dtype, self.device = operator.dtype, operator.device
        self.forms, self.stratum_weights = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self._size, self._size

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product with a vector over the places."""
        whole = torch.zeros(self._operator.shape[0], dtype=self.dtype, device=self.device)
        start = 0
        for place in self._places:
            length = place.stop - place.start
            whole[place] = vector[start : start + length]
            start += length
        product = self._operator.matvec(whole)
        self.forms = self._operator.forms.sum(0, keepdim=True)
        return torch.cat([product[place] for place in self._places])
