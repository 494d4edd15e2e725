"""Check that a Krylov space holds all of the largest eigenvalues, with every copy of those that are repeated."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moe_heads.callbacks.functional.curvature.basis import dot, norm
from moe_heads.callbacks.functional.curvature.iteration import KrylovIteration
from moe_heads.callbacks.functional.curvature.operator import SymmetricOperator

__all__ = ["CHANCE_OF_MISSING", "MARGIN", "CompletenessCheck", "are_none_above", "bound_outside"]

CHANCE_OF_MISSING = 1e-3
"""Probability, over the random start of the check, with which a missing eigenvalue goes unnoticed, at most."""

MARGIN = 0.05
"""Part of the tolerance by which a missing eigenvalue may lie above the k-th: those of a cluster need not be parted."""

# Steps after which the check is given up.
_MOST_STEPS = 60


class CompletenessCheck:
    r"""Looks for eigenvalues above the k-th outside a Krylov space.

    Some Lanczos steps with :math:`B = \Pi H \Pi`, :math:`\Pi` the projection on the complement of the basis, from a
    random vector. Once the k largest Ritz pairs are accurate, B has none of the large eigenvalues but further copies of
    repeated ones. They take three vectors of memory: the basis is not extended.

    Args:
        operator: The matrix H.
        iteration: The Krylov space.
        num_eigenvalues: k.
        tolerance: Largest relative residual.
        max_steps: Most products, those of the iteration included.
        notify: Called after each product.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        iteration: KrylovIteration,
        num_eigenvalues: int,
        tolerance: float,
        max_steps: int,
        notify: Callable[[], None],
    ) -> None:
        self._operator, self._iteration, self._k = operator, iteration, num_eigenvalues
        self._tolerance, self._max_steps, self._notify = tolerance, max_steps, notify
        self._missing_above, self._num_above = math.inf, 0
        self._bound, self._look_again_at = math.inf, 0

    def forget(self) -> None:
        """Take back what is known of the complement: a restart made it larger."""
        self._bound = math.inf

    def is_still_missing(self, values: Tensor) -> bool:
        """Whether the eigenvalue that the last check saw outside is not among these Ritz values yet."""
        return self._missing_above < math.inf and int((values > self._missing_above).sum()) <= self._num_above

    def run(self) -> Literal["complete", "missing", "unknown"] | int:
        """Take as many steps as are needed.

        Returns:
            "complete": no eigenvalue above the k-th is missing. "missing": there is one. "unknown": there were not
            enough steps to tell. A number: the place of the remainder that could still raise a further Ritz value above
            the k-th.
        """
        iteration = self._iteration
        values, _, shares = iteration.ritz()
        if len(values) < self._k:
            return "missing"
        level = self._level(values)
        self._missing_above = math.inf
        gram = iteration.residual_gram()
        if are_none_above(iteration.projected, gram, level, self._bound):
            return "complete"
        if self._bound >= level or iteration.num_steps >= self._look_again_at:
            began = iteration.num_steps
            found = self._look_outside(values, level)
            # the basis takes in what made the bound weak: look again once that many steps went into it
            self._look_again_at = 2 * iteration.num_steps - began
            if found != "bounded":
                return found
            if are_none_above(iteration.projected, gram, level, self._bound):
                return "complete"
        # a Ritz value below the k-th may rise: it has to become more accurate first
        return int(shares[:, int((values <= level).nonzero()[-1])].argmax())

    def _level(self, values: Tensor) -> float:
        """What lies above the k-th eigenvalue, a small part of the tolerance allowed."""
        kth = float(values[-self._k])
        return kth + max(MARGIN * self._tolerance * abs(kth), self._iteration.rounding)

    def _look_outside(self, values: Tensor, level: float) -> Literal["complete", "missing", "unknown", "bounded"]:
        """Take Lanczos steps outside the basis until something above the level shows, or a bound below it is there."""
        iteration, kth = self._iteration, float(values[-self._k])
        alphas: list[float] = []
        betas: list[float] = []
        before, vector = torch.zeros(0), iteration.fresh()
        while iteration.num_steps < self._max_steps and len(alphas) < _MOST_STEPS:
            product = self._operator.matvec(vector)
            iteration.num_steps += 1
            iteration.steps_of_check += 1
            alphas.append(dot(vector, product))
            rest = product.sub(vector, alpha=alphas[-1])
            if betas:
                rest.sub_(before, alpha=betas[-1])
            rest = iteration.basis.complement(rest)
            betas.append(norm(rest))
            self._notify()
            outside, residuals = _ritz(alphas, betas)
            largest = float(outside[-1])
            if largest > level:
                self._missing_above, self._num_above = level, int((values > level).sum())
                return "missing"
            if float(residuals[-1]) <= level - kth:
                if level - largest <= 2 * (level - kth):
                    # nothing above it is missing; where it is a copy of the k-th, nothing more can be said
                    return "complete"
                return self._accept_or_take_in(values, level, kth, largest)
            self._bound = bound_outside(outside, float(values[0]), iteration.dim - len(values))
            if self._bound < level:
                gram = iteration.residual_gram()
                is_enough = are_none_above(iteration.projected, gram, level, self._bound)
                # a sharper bound helps only if the largest value outside itself would be enough
                if is_enough or not are_none_above(iteration.projected, gram, level, largest):
                    return "bounded"
            before, vector = vector, rest / betas[-1]
        self._bound = math.inf
        return "unknown"

    def _accept_or_take_in(
        self, values: Tensor, level: float, kth: float, largest: float
    ) -> Literal["missing", "bounded"]:
        """Use the largest eigenvalue outside as the bound, or have it taken into the basis where that is too weak."""
        self._bound = largest
        if are_none_above(self._iteration.projected, self._iteration.residual_gram(), level, largest):
            return "bounded"
        # so near to the level, the bound takes every unfinished Ritz pair for a large one
        self._bound = math.inf
        self._missing_above = largest - (level - kth)
        self._num_above = int((values > self._missing_above).sum())
        return "missing"


def bound_outside(ritz: Tensor, lowest: float, dim: int) -> float:
    r"""Bound the largest eigenvalue of a symmetric matrix by the Ritz values of a Lanczos run.

    After m steps from a random start in dimension n, the largest Ritz value :math:`\xi` satisfies
    :math:`P[\lambda_1 - \xi > \varepsilon (\lambda_1 - \lambda_n)] \le 1.648 \sqrt n \, e^{-\sqrt\varepsilon (2m - 1)}`
    whatever the spectrum is (Kuczyński and Woźniakowski 1992, Theorem 4.1). With the probability `CHANCE_OF_MISSING`
    this gives :math:`\lambda_1 \le (\xi - \varepsilon \lambda_n) / (1 - \varepsilon)`.

    Args:
        ritz: Ritz values of the run, ascending; m of them.
        lowest: Estimate of the smallest eigenvalue :math:`\lambda_n`.
        dim: n.

    Returns:
        The bound; infinite after too few steps.
    """
    share = (math.log(1.648 * math.sqrt(max(dim, 1)) / CHANCE_OF_MISSING) / (2 * len(ritz) - 1)) ** 2
    if share >= 1:
        return math.inf
    return (float(ritz[-1]) - share * min(lowest, float(ritz[0]))) / (1 - share)


def are_none_above(projected: Tensor, residual_gram: Tensor, level: float, bound: float) -> bool:
    r"""Return whether H has no more eigenvalues above ``level`` than its projection T.

    With B the part of H on the complement of the basis and :math:`B \le b < x`, the inertia of H - x is that of
    B - x, which has no positive part, and of the Schur complement
    :math:`T - x + E^T (x - B)^{-1} E \le T - x + E^T E / (x - b)`, with :math:`E^T E` the Gram matrix of the
    residuals HQ - QT.

    Args:
        projected: T, (m, m).
        residual_gram: :math:`E^T E`, (m, m).
        level: x.
        bound: b.
    """
    raised = torch.linalg.eigvalsh(projected + residual_gram / (level - bound)) if bound < level else None
    return raised is not None and int((raised > level).sum()) == int((torch.linalg.eigvalsh(projected) > level).sum())


def _ritz(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and residual norms of a tridiagonal matrix; the last beta is that of the remainder."""
    inner = torch.tensor(betas[:-1], dtype=torch.float64)
    diagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(diagonal + torch.diag(inner, 1) + torch.diag(inner, -1))
    return values, betas[-1] * vectors[-1].abs()
