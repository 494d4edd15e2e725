"""Check that a Krylov space holds all of the largest eigenvalues, with every copy of repeated ones."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.basis import Basis, dot, norm
from moe_heads.analysis.sharpness.hessian.iteration import KrylovIteration
from moe_heads.analysis.sharpness.hessian.krylov import margin_of
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["CHANCE_OF_MISSING", "NUM_OUTSIDE", "CompletenessCheck", "bound_outside", "raised_by_chain"]

CHANCE_OF_MISSING = 1e-3
"""Upper bound of the probability, over the random start of the check, that it overlooks a missing eigenvalue."""

NUM_OUTSIDE = 2
"""Number of vectors that a check needs in addition to the basis: the last two of its own iteration."""

# Maximum number of steps of a check. Then the iteration adds the largest value outside to its basis.
_MOST_STEPS = 60

# The squared parts of a random vector in two eigenvectors have a smaller ratio once in a thousand times. Copies of a
# known eigenvalue that rounding brings in have a smaller part.
_OF_ROUNDING = 1e-6

# Square of the ratio by which the coupling of further copies may exceed that of the known one.
_COUPLING = 10

# Part of the distance from the k-th eigenvalue to the next one outside at which a bound is worth using.
_FAR_ENOUGH = 0.2


Verdict = Literal["complete", "missing", "unknown", "bounded"]


class CompletenessCheck:
    r"""Search for eigenvalues above the k-th outside a Krylov space.

    The check takes some Lanczos steps with :math:`B = \Pi H \Pi`, :math:`\Pi` the projection on the complement of the
    basis, from a random vector. Once the k largest Ritz pairs are accurate, the only large eigenvalues of B are further
    copies of repeated ones.

    Args:
        operator: The matrix H.
        iteration: The Krylov space.
        num_eigenvalues: k.
        tolerance: Largest relative residual.
        max_steps: Maximum number of products, including those of the iteration.
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
        self._look_again_at = 0
        # the bound on what was outside when the basis had that size, and what the bound leaves out
        self._bound, self._size = math.inf, 0
        self._added: Tensor | None = None

    def forget(self) -> None:
        """Reset the bound on the complement, which a restart made larger."""
        self._bound = math.inf

    def is_still_missing(self, values: Tensor) -> bool:
        """Return whether these Ritz values still lack the eigenvalue that the last check found outside."""
        return self._missing_above < math.inf and int((values > self._missing_above).sum()) <= self._num_above

    def run(self) -> Literal["complete", "missing", "unknown"] | int:
        """Take as many steps as needed.

        Returns:
            "complete" if no eigenvalue above the k-th is missing, "missing" if there is one, "unknown" if there were
            too few steps. An integer is the index of the remainder that could still raise a further Ritz value above
            the k-th.
        """
        iteration = self._iteration
        values, _, shares = iteration.ritz()
        if len(values) < self._k:
            return "missing"
        self._missing_above = math.inf
        if self._are_none_above(values):
            return "complete"
        if self._bound >= float(values[-self._k]) + self._step(values) or iteration.num_steps >= self._look_again_at:
            began = iteration.num_steps
            found = self._look_outside(values)
            # The iteration adds the cause of a weak bound to the basis. Check again after as many steps.
            self._look_again_at = 2 * iteration.num_steps - began
            if found != "bounded":
                return found
            if self._are_none_above(values):
                return "complete"
        # A Ritz value below the k-th may rise, so it has to become more accurate first.
        level = float(values[-self._k]) + 3 * self._step(values)
        return int(shares[:, int((values <= level).nonzero()[-1])].argmax())

    def _step(self, values: Tensor) -> float:
        """Return a third of the margin: for the value outside, for its error, and for the inertia."""
        return margin_of(float(values[-self._k]), self._tolerance, self._iteration.rounding) / 3

    def _look_outside(self, values: Tensor) -> Verdict:
        """Take Lanczos steps outside the basis until a value above the k-th appears, or there is a bound below it."""
        iteration = self._iteration
        outside = _Outside(iteration)
        self._size, self._added = len(values), None
        while iteration.num_steps < self._max_steps and len(outside.alphas) < _MOST_STEPS:
            outside.add(self._operator)
            self._notify()
            found = self._judged(outside, values)
            if found is not None:
                return found
        if iteration.num_steps >= self._max_steps:
            self._bound = math.inf
            return "unknown"
        return self._take_in(values, float(outside.ritz()[0][-1]) - self._step(values))

    def _judged(self, outside: "_Outside", values: Tensor) -> Verdict | None:
        """Return what the steps outside show so far; None where further ones are needed."""
        kth, step = float(values[-self._k]), self._step(values)
        ritz, residuals = outside.ritz()
        largest = float(ritz[-1])
        if largest > kth + step:
            return self._take_in(values, kth + step)
        if outside.is_exhausted and not self._iteration.remainders:
            return "complete"  # nothing couples the two spaces, and all values outside are known
        if float(residuals[-1]) > step:
            self._bound = bound_outside(ritz, float(values[0]), self._iteration.dim - len(values))
            # A sharper bound helps only if the largest value outside would be enough as a bound.
            is_final = self._bound < kth + step and not self._are_none_above(values, largest)
            return "bounded" if is_final or self._are_none_above(values) else None
        self._bound = largest + step
        # A value far below the k-th belongs to a pair of the iteration that still rises, and not to a copy.
        if self._are_none_above(values) or kth - largest > self._tolerance * abs(kth) + 3 * step:
            return "bounded"
        return self._judged_copies(outside, values)

    def _judged_copies(self, outside: "_Outside", values: Tensor) -> Verdict | None:
        """Return the same where the largest value outside has converged to a copy of the k-th.

        A bound so near to the level makes every inaccurate Ritz pair large. So the copies are counted by their coupling
        to the basis, and the bound is on the rest.
        """
        kth, step = float(values[-self._k]), self._step(values)
        ritz, residuals = outside.ritz()
        largest, lowest = float(ritz[-1]), float(values[0])
        count = int(((ritz >= largest - 2 * step) & (residuals <= step)).sum())
        rest = ritz[:-count][outside.is_real()[:-count]]
        next_value = float(rest[-1]) if len(rest) else lowest
        bound = bound_outside(rest, lowest, self._iteration.dim - len(values) - count, largest)
        added = outside.influence(count, kth + 3 * step)
        if self._are_none_above(values, next_value if outside.is_exhausted else bound, added):
            return "complete"
        is_chain = len(self._iteration.remainders) == 1
        if is_chain and kth - bound > _FAR_ENOUGH * (kth - next_value):
            # the steps of the iteration show how little reaches the values below the bound
            self._bound, self._added = bound, added
            return "bounded"
        is_useful = self._are_none_above(values, next_value, added) or (is_chain and next_value < kth - 3 * step)
        return None if is_useful and not outside.is_exhausted else self._take_in(values, largest - step)

    def _are_none_above(self, values: Tensor, bound: float | None = None, added: Tensor | None = None) -> bool:
        """Return whether no eigenvalue lies more than the margin above the k-th.

        Args:
            values: The Ritz values.
            bound: Upper bound of the eigenvalues outside the basis; by default the last one, and what was outside the
                basis then.
            added: Contribution to the Schur complement of eigenvectors outside that the bound does not cover.
        """
        iteration = self._iteration
        level = float(values[-self._k]) + 3 * self._step(values)
        projected, size = iteration.projected, len(values)
        if bound is None:
            bound, added, size = self._bound, self._added, self._size
        if bound >= level:
            return False
        if size == len(values) or (added is None and len(iteration.remainders) > 1):
            # the bound holds outside a larger basis too
            raised: Tensor | None = projected + iteration.residual_gram() / (level - bound)
        else:
            remainders = iteration.remainders
            raised = raised_by_chain(projected, size, [norm(r) for r in remainders], level, bound)
        if raised is not None and added is not None:
            raised = raised + added
        return raised is not None and _num_above(raised, level) == _num_above(projected, level)

    def _take_in(self, values: Tensor, above: float) -> Literal["missing"]:
        """Let the iteration continue until there is one more Ritz value above a number."""
        self._bound = math.inf
        self._missing_above, self._num_above = above, int((values > above).sum())
        return "missing"


class _Outside:
    """A Lanczos iteration outside the basis, from a random vector.

    It keeps its vectors while the basis leaves room, because without them a converged value appears again.
    """

    def __init__(self, iteration: KrylovIteration) -> None:
        self._iteration = iteration
        # random signs may have no part in an eigenvector with few entries, such as those of a diagonal matrix
        self._before, self._vector = torch.zeros(0), iteration.fresh(is_normal=True)
        self._kept = Basis(iteration.dim, self._vector.dtype, self._vector.device)
        self.alphas: list[float] = []
        self._betas: list[float] = []
        self._couplings: list[Tensor] = []

    def add(self, operator: SymmetricOperator) -> None:
        """Take one step."""
        iteration = self._iteration
        dots = [dot(remainder, self._vector) for remainder in iteration.remainders]
        self._couplings.append(torch.tensor(dots, dtype=torch.float64))
        vector = self._vector
        rest = operator.matvec(vector)
        iteration.num_steps += 1
        iteration.num_check_steps += 1
        self.alphas.append(dot(vector, rest))
        rest.sub_(vector, alpha=self.alphas[-1])
        if self._betas:
            rest.sub_(self._before, alpha=self._betas[-1])
        rest = iteration.basis.complement(rest, in_place=True)
        if len(self._kept) < iteration.num_spare - NUM_OUTSIDE:
            self._kept.append(vector)
            vector = self._kept[-1]
        if len(self._kept):
            rest = self._kept.complement(rest, in_place=True)
        self._betas.append(norm(rest))
        self._before, self._vector = vector, rest.div_(max(self._betas[-1], 1e-300))

    @property
    def is_exhausted(self) -> bool:
        """True if the Ritz values are all of the eigenvalues outside, up to rounding."""
        is_whole = len(self.alphas) == self._iteration.dim - len(self._iteration.basis)
        return is_whole or self._betas[-1] <= self._iteration.rounding

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, ascending, and their residual norms."""
        values, vectors = self._eigenpairs()
        return values, self._betas[-1] * vectors[-1].abs()

    def is_real(self) -> Tensor:
        """Return whether each Ritz vector has a part in the start vector that chance explains, relative to the last."""
        parts = self._eigenpairs()[1][0].square()
        return parts > _OF_ROUNDING * parts[-1]

    def influence(self, count: int, level: float) -> Tensor:
        """Return the part of the last Ritz vectors and their copies in the Schur complement at a level, (m, m)."""
        iteration = self._iteration
        if not iteration.remainders:
            return torch.zeros_like(iteration.projected)
        values, vectors = self._eigenpairs()
        couplings = iteration.tails @ torch.stack(self._couplings).T @ vectors[:, -count:]
        return _COUPLING * couplings @ couplings.T / (level - float(values[-1]))

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        inner = torch.tensor(self._betas[:-1], dtype=torch.float64)
        diagonal = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        values, vectors = torch.linalg.eigh(diagonal + torch.diag(inner, 1) + torch.diag(inner, -1))
        return values, vectors


def bound_outside(ritz: Tensor, lowest: float, dim: int, above: float | None = None) -> float:
    r"""Return an upper bound of the largest eigenvalue of a symmetric matrix from the Ritz values of a Lanczos run.

    After m steps from a random start in dimension n, the largest Ritz value :math:`\xi` satisfies
    :math:`P[\lambda_1 - \xi > \varepsilon (\lambda_1 - \lambda_n)] \le 1.648 \sqrt n \, e^{-\sqrt\varepsilon (2m - 1)}`
    whatever the spectrum is (Kuczyński and Woźniakowski 1992, Theorem 4.1). With the probability `CHANCE_OF_MISSING`
    this gives :math:`\lambda_1 \le (\xi - \varepsilon \lambda_n) / (1 - \varepsilon)`. The other Ritz values bound the
    second eigenvalue in the same way. A polynomial that vanishes at the first costs a step. It reduces the part of the
    second in the start vector, relative to the rest, by at most
    :math:`(\lambda_1 - \lambda_n) / (\lambda_1 - \lambda_2)`.

    Args:
        ritz: The m Ritz values of the run, ascending.
        lowest: Estimate of the smallest eigenvalue :math:`\lambda_n`.
        dim: n.
        above: A larger eigenvalue, all of whose Ritz values have converged and are not among ``ritz``.

    Returns:
        The bound; infinite after too few steps.
    """
    if len(ritz) == 0:
        return math.inf
    lowest = min(lowest, float(ritz[0]))
    ratio = 1.648 * math.sqrt(max(dim, 1)) / CHANCE_OF_MISSING
    if above is not None:
        ratio *= (above - lowest) / max(above - float(ritz[-1]), 1e-300)
    share = (math.log(ratio) / (2 * len(ritz) - 1)) ** 2
    return (float(ritz[-1]) - share * lowest) / (1 - share) if share < 1 else math.inf


def raised_by_chain(
    projected: Tensor, size: int, remainders: Sequence[float], level: float, bound: float
) -> Tensor | None:
    r"""Bound the Schur complement of an operator, as it was before the last steps of a Lanczos iteration.

    With B the part of H outside the first m vectors, :math:`B \le b < x`, the inertia of H - x is that of B - x, which
    has no positive part, and of :math:`T - x + c c^T q^T (x - B)^{-1} q` for the next vector q and its couplings c. The
    steps since are a Lanczos iteration of B from q. Their Gauss-Radau rule with a node at b is an upper bound of the
    form (Golub and Meurant 1994).

    Args:
        projected: T after the last steps.
        size: m.
        remainders: Norms of the remainders after the last step: one, or none where the iteration is exhausted.
        level: x.
        bound: b.

    Returns:
        :math:`T` of the first m vectors plus the bound of the second term, (m, m). None if the steps are not those of
        one Lanczos iteration, or contradict the bound.
    """
    chain = projected[size:, size:]
    is_chain = len(remainders) <= 1 and not projected[:size, size + 1 :].any() and not chain.triu(2).any()
    if not is_chain or float(torch.linalg.eigvalsh(chain)[-1]) >= bound:
        return None
    first, last = torch.eye(len(chain), dtype=torch.float64)[[0, -1]]
    beta = remainders[0] if remainders else 0.0
    end = bound + beta**2 * float(
        torch.linalg.solve(chain - bound * torch.eye(len(chain), dtype=torch.float64), last)[-1]
    )
    # e1^T (x - T)^{-1} e1 for the chain with one more vector, by elimination of that vector
    shifted = level * torch.eye(len(chain), dtype=torch.float64) - chain
    shifted[-1, -1] -= beta**2 / (level - end)
    form = float(torch.linalg.solve(shifted, first)[0])
    couplings = projected[:size, size]
    return projected[:size, :size] + form * couplings.outer(couplings)


def _num_above(matrix: Tensor, level: float) -> int:
    return int((torch.linalg.eigvalsh(matrix) > level).sum())
