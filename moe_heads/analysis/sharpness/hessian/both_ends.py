"""Eigenvalues of largest magnitude, from Lanczos iterations at both ends of the spectrum."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.basis import Basis
from moe_heads.analysis.sharpness.hessian.completeness import bound_outside
from moe_heads.analysis.sharpness.hessian.iteration import KrylovIteration
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.lanczos import lanczos
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["LowerEnd", "Which", "by_magnitude", "lower_end"]

Which = Literal["largest", "magnitude"]
"""The algebraically largest eigenvalues, or those of largest magnitude."""

# Maximum number of products to bound what is left. Then one more of the smallest eigenvalues is computed.
_MOST_STEPS = 60

# Part of the k-th magnitude above which no number of steps gives a bound below it.
_TOO_CLOSE = 0.95


@dataclass(frozen=True, eq=False)
class LowerEnd:
    r"""The smallest eigenvalues of H, as the largest ones of :math:`\sigma - H`.

    Attributes:
        krylov: Result of the iteration with :math:`\sigma - H`; None if no negative eigenvalue was needed.
        shift: :math:`\sigma`, the k-th largest magnitude. It keeps relative tolerances meaningful for eigenvalues near
            zero.
        num_steps: Products, also those of iterations that a further one replaced.
        bound: Upper bound of the magnitude of all other negative eigenvalues.
    """

    krylov: LanczosResult | None
    shift: float
    num_steps: int
    bound: float = math.inf

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """The smallest eigenvalues of H, ascending."""
        return () if self.krylov is None else tuple(self.shift - value for value in self.krylov.eigenvalues)

    def is_complete(self, upper: LanczosResult) -> bool:
        """Return whether all k of largest magnitude are among these and the k largest eigenvalues.

        Args:
            upper: Result of `lanczos` for the k largest eigenvalues.
        """
        k, own = upper.num_eigenvalues, self.eigenvalues
        values = (*upper.eigenvalues, *own)
        places = by_magnitude(upper.eigenvalues, own, k)
        num_below = sum(place >= len(upper.eigenvalues) for place in places)
        if not upper.is_complete or not (self.krylov is None or self.krylov.is_complete):
            return False
        # one more than needed, or a bound, shows that the others are smaller
        return num_below == k or num_below < len(own) or self.bound < min(abs(values[place]) for place in places)


def by_magnitude(upper: tuple[float, ...], lower: tuple[float, ...], count: int) -> list[int]:
    """Return the places of the largest magnitudes in the two lists put together, in descending order.

    A negative value of ``upper`` and a positive one of ``lower`` come last, since the other list may have it too.
    """
    values = (*upper, *lower)
    is_own = [value >= 0 for value in upper] + [value < 0 for value in lower]
    order = sorted(range(len(values)), key=lambda place: (is_own[place], abs(values[place])), reverse=True)
    return order[:count]


def lower_end(
    operator: SymmetricOperator,
    upper: LanczosResult,
    *,
    generator: torch.Generator,
    max_steps: int,
    basis_memory: int | None = None,
    on_step: Callable[[LowerEnd], None] | None = None,
) -> LowerEnd:
    """Return the negative eigenvalues among the k of largest magnitude, and a bound of the others.

    Some Lanczos steps from a random vector outside the found eigenvectors give the bound (`bound_outside`). Where
    another eigenvalue is too close to the k-th magnitude, it is computed too.

    Args:
        operator: The matrix H.
        upper: Result of `lanczos` for its k largest eigenvalues.
        generator: Source of the random vectors.
        max_steps: Maximum number of further products.
        basis_memory: Bytes for the vectors, see `lanczos`; in addition to those of ``upper``.
        on_step: Called after each step with the result so far.
    """
    k, below = upper.num_eigenvalues, tuple(value for value in upper.ritz[0].tolist() if value < 0)
    start, count, num_steps = upper.basis.combined(upper.ritz[1][:, :k].sum(1)[None])[0], 0, 0
    krylov: LanczosResult | None = None
    while True:
        selected = _selected(upper.eigenvalues, below, k)
        shift = min(map(abs, selected)) or 1.0
        count = max(count, sum(value < 0 for value in selected))
        if count:
            krylov = lanczos(
                _Shifted(operator, shift),
                generator=generator,
                num_eigenvalues=count,
                tolerance=upper.tolerance / 2,
                max_steps=max(max_steps - num_steps, count),
                start=start,
                basis_memory=basis_memory,
                on_step=None if on_step is None else _notify(on_step, shift, num_steps),
            )
            num_steps += krylov.num_steps
        found = LowerEnd(krylov, shift, num_steps)
        if found.is_complete(upper) or num_steps >= max_steps or count == k:
            return found
        below = found.eigenvalues
        level = min(map(abs, _selected(upper.eigenvalues, below, k)))
        found = _bounded(operator, upper, found, generator, level, max_steps, on_step)
        num_steps = found.num_steps
        if found.bound < level or num_steps >= max_steps:
            return found
        start, count = found.krylov.vectors().sum(0) if found.krylov is not None else start, count + 1


def _bounded(
    operator: SymmetricOperator,
    upper: LanczosResult,
    found: LowerEnd,
    generator: torch.Generator,
    level: float,
    max_steps: int,
    on_step: Callable[[LowerEnd], None] | None,
) -> LowerEnd:
    """Bound the magnitude of the other negative eigenvalues, until the bound is below a level."""
    known = Basis(operator.shape[0], operator.dtype, operator.device)
    error = 0.0
    if found.krylov is not None:
        for vector in found.krylov.vectors():
            known.append(vector)
        # the found eigenvectors are coupled to the others by their residuals, which may change these by their norm
        error = math.hypot(*found.krylov.residual_norms.flip(0)[: len(known)].tolist())
    outside = _Outside(operator, known)
    start = torch.randn(operator.shape[0], generator=generator, dtype=operator.dtype).to(operator.device)
    dim = operator.shape[0] - len(known)
    most = min(_MOST_STEPS, max_steps - found.num_steps, dim)
    iteration = KrylovIteration(outside, generator, 1, upper.tolerance, most + 1, known.complement(start))
    while True:
        iteration.step()
        values = iteration.ritz()[0]
        is_exhausted = iteration.active is None
        bound = float(values[-1]) if is_exhausted else bound_outside(values, -upper.eigenvalues[0], dim)
        found = replace(found, num_steps=found.num_steps + 1, bound=max(bound + error, 0.0))
        if on_step is not None:
            on_step(found)
        is_too_close = float(values[-1]) > _TOO_CLOSE * level
        if found.bound < level or is_exhausted or is_too_close or iteration.num_steps >= most:
            return found
        assert iteration.active is not None
        iteration.proceed(iteration.active)


class _Operator:
    """An operator made of another one, without parts of the data."""

    num_strata = 1

    def __init__(self, operator: SymmetricOperator) -> None:
        self._operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.stratum_weights = torch.ones(1, dtype=torch.float64)
        self.forms = torch.zeros(1, dtype=torch.float64)


class _Shifted(_Operator):
    r"""The operator :math:`\sigma - H`."""

    def __init__(self, operator: SymmetricOperator, shift: float) -> None:
        super().__init__(operator)
        self._shift = shift

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product with a vector."""
        return self._shift * vector - self._operator.matvec(vector)


class _Outside(_Operator):
    r"""The operator :math:`-\Pi H \Pi`, with :math:`\Pi` the projection on the complement of known vectors."""

    def __init__(self, operator: SymmetricOperator, known: Basis) -> None:
        super().__init__(operator)
        self._known = known

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        """Return the product with a vector of the complement."""
        product = -self._operator.matvec(vector)
        return self._known.complement(product) if len(self._known) else product


def _selected(upper: tuple[float, ...], lower: tuple[float, ...], count: int) -> list[float]:
    values = (*upper, *lower)
    return [values[place] for place in by_magnitude(upper, lower, count)]


def _notify(on_step: Callable[[LowerEnd], None], shift: float, before: int) -> Callable[[LanczosResult], None]:
    return lambda krylov: on_step(LowerEnd(krylov, shift, before + krylov.num_steps))
