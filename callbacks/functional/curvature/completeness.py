"""Bounds on eigenvalues that a Krylov space has missed."""

import math

import torch
from torch import Tensor

__all__ = ["are_none_above", "chance_of_missing"]


def chance_of_missing(ritz: Tensor, level: float, lowest: float, dim: int) -> float:
    r"""Bound the probability that a symmetric matrix has an eigenvalue above ``level`` that its Lanczos run missed.

    After m steps from a random start in dimension n, the largest Ritz value :math:`\xi` satisfies
    :math:`P[\lambda_1 - \xi > \varepsilon (\lambda_1 - \lambda_n)] \le 1.648 \sqrt n \, e^{-\sqrt\varepsilon (2m - 1)}`
    whatever the spectrum is (Kuczyński and Woźniakowski 1992, Theorem 4.1).

    Args:
        ritz: Ritz values of the run, ascending; m of them.
        level: Eigenvalue in question.
        lowest: Estimate of the smallest eigenvalue :math:`\lambda_n`.
        dim: n.
    """
    largest = float(ritz[-1])
    if level <= largest:
        return 1.0
    share = (level - largest) / (level - min(lowest, float(ritz[0])))
    return min(1.0, 1.648 * math.sqrt(dim) * math.exp(-math.sqrt(share) * (2 * len(ritz) - 1)))


def are_none_above(projected: Tensor, residual_gram: Tensor, level: float, bound: float) -> bool:
    r"""Return whether H has no more eigenvalues above ``level`` than its projection T.

    With B the part of H on the complement of the basis and :math:`B \le b < x`, the inertia of H - x is that of
    B - x, which has no positive part, and of the Schur complement
    :math:`T - x + E^T (x - B)^{-1} E \le T - x + E^T E / (x - b)`, :math:`E^T E` the Gram matrix of the residuals HQ - QT.

    Args:
        projected: T, (m, m).
        residual_gram: :math:`E^T E`, (m, m).
        level: x.
        bound: b.
    """
    raised = projected + residual_gram / (level - bound)
    return int((torch.linalg.eigvalsh(raised) > level).sum()) == int((torch.linalg.eigvalsh(projected) > level).sum())
