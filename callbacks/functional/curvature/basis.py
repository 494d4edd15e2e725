"""Orthonormal vectors of a Krylov space, and the random vectors that Krylov and trace methods start from."""

import math

import torch
from torch import Tensor

__all__ = ["Basis", "dot", "norm", "rademacher"]

# Rows allocated at a time: the basis grows without copying, and without memory for steps that are never taken.
_ROWS = 16


class Basis:
    """Orthonormal vectors :math:`q_1 .. q_m` of length P; takes m·P numbers of memory.

    Args:
        dim: P.
        dtype: Data type of the vectors.
        device: Device of the vectors.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dim, self._dtype, self._device = dim, dtype, device
        self._blocks: list[Tensor] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def last(self) -> Tensor:
        """The vector added last, shape (P,)."""
        return self._filled()[-1][-1]

    def append(self, vector: Tensor) -> None:
        """Add a vector that is orthonormal to the others."""
        if self._length == _ROWS * len(self._blocks):
            self._blocks.append(torch.empty(_ROWS, self._dim, dtype=self._dtype, device=self._device))
        self._blocks[-1][self._length % _ROWS] = vector
        self._length += 1

    def complement(self, vector: Tensor) -> Tensor:
        """:math:`(I - QQ^T)v`, by two passes of Gram-Schmidt (one leaves rounding errors of the size of ``v``)."""
        for _ in range(2):
            for block in self._filled():
                vector = vector - block.T @ (block @ vector)
        return vector

    def combined(self, coefficients: Tensor) -> Tensor:
        """Linear combinations :math:`CQ` of the first m vectors, shape (k, P), for ``coefficients`` (k, m)."""
        weights = coefficients.to(self._device, self._dtype)
        total = torch.zeros(len(weights), self._dim, dtype=self._dtype, device=self._device)
        for block, part in zip(self._filled(), weights.split(_ROWS, dim=1), strict=False):
            total += part @ block[: part.shape[1]]
        return total

    def _filled(self) -> list[Tensor]:
        return [block[: self._length - index * _ROWS] for index, block in enumerate(self._blocks)]


def rademacher(dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Independent signs ±1, shape (dim,). Drawn on the CPU, so that every device sees the same vector."""
    signs = torch.randint(0, 2, (dim,), dtype=torch.int8, generator=generator)
    return signs.mul_(2).sub_(1).to(device, dtype)


def dot(left: Tensor, right: Tensor) -> float:
    """Inner product, summed in float64."""
    return float(torch.sum(left * right, dtype=torch.float64))


def norm(vector: Tensor) -> float:
    """Euclidean norm, summed in float64."""
    return math.sqrt(dot(vector, vector))
