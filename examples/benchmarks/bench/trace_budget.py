"""Number of products for a trace with a given standard error, estimated from samples of our operator.

The estimators of other libraries return a number without an error, so their users have to guess the budget. Here it is
computed and its cost does not count: XTrace's own error estimate (Epperly, Tropp and Webber 2024, section 2.3) for a
growing number of test vectors, from inner products only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["TraceBudget", "hutchinson_samples_needed", "trace_budget"]

_MIN_VECTORS = 8  # as for our own probes


class TraceBudget:
    """Test vectors w, their images y = Hw and z = Hy, as inner products.

    Args:
        matvec: Product with H.
        dim: P.
        seed: Seed of the test vectors.

    Attributes:
        count: Current number of test vectors, k. XTrace takes 2k products, Hutch++ with the same basis 3k.
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], dim: int, seed: int) -> None:
        self._matvec, self._dim = matvec, dim
        self._generator = torch.Generator().manual_seed(seed)
        self._w: list[Tensor] = []
        self._y: list[Tensor] = []
        self._yy = self._yz = self._wy = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Current number of test vectors."""
        return len(self._w)

    @property
    def hutchinson(self) -> list[float]:
        """The samples wᵀHw of Hutchinson's estimator."""
        return self._wy.diag().tolist()

    def add(self) -> None:
        """Add one test vector, with two products."""
        w = torch.randint(0, 2, (self._dim,), generator=self._generator).mul_(2).sub_(1).float()
        y = self._matvec(w)
        z = self._matvec(y)
        self._w.append(w)
        self._y.append(y)
        self._yy = _bordered(self._yy, [_dot(other, y) for other in self._y])
        self._yz = _bordered(self._yz, [_dot(other, z) for other in self._y])
        self._wy = _bordered(self._wy, [_dot(other, y) for other in self._w])

    def estimate(self) -> tuple[float, float]:
        """Return XTrace's estimate of the trace and its standard error."""
        samples = torch.tensor([self._without(i) for i in range(self.count)], dtype=torch.float64)
        return float(samples.mean()), float(samples.std() / math.sqrt(len(samples)))

    def _without(self, i: int) -> float:
        """Return the exact trace on the span of the other y plus the sample of w on the complement."""
        rest = [j for j in range(self.count) if j != i]
        yy, yz = self._yy[rest][:, rest], self._yz[rest][:, rest]
        coefficients = torch.linalg.solve(yy, self._wy[rest, i])
        outside = self._wy[i, i] - 2 * coefficients @ self._yy[rest, i] + coefficients @ yz @ coefficients
        return float(torch.linalg.solve(yy, yz).trace() + outside)


def trace_budget(
    matvec: Callable[[Tensor], Tensor], dim: int, stderr: float, *, seed: int, max_vectors: int = 64
) -> TraceBudget:
    """Find the smallest number of test vectors, at least eight, with XTrace's error estimate below ``stderr``."""
    budget = TraceBudget(matvec, dim, seed)
    while budget.count < _MIN_VECTORS or (budget.estimate()[1] > stderr and budget.count < max_vectors):
        budget.add()
    return budget


def hutchinson_samples_needed(samples: list[float], stderr: float) -> int:
    """Return the number of samples for a standard error of their mean, given their variance."""
    return math.ceil(float(torch.tensor(samples, dtype=torch.float64).var()) / stderr**2)


def _bordered(matrix: Tensor, border: list[float]) -> Tensor:
    column = torch.tensor(border, dtype=torch.float64)[:, None]
    return torch.cat([torch.cat([matrix, column[:-1]], dim=1), column.T])


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.double(), right.double()))
