"""Krylov relation of a symmetric operator, with its eigenvalues and their residuals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.basis import Basis, dot

__all__ = ["LanczosResult", "margin_of"]

# Part of the tolerance by which a missing eigenvalue may lie above the k-th. It leaves clusters unresolved.
_MARGIN = 0.05

# The same in units of the rounding errors.
_MARGIN_OF_ROUNDING = 0.3


def margin_of(kth: float, tolerance: float, rounding: float) -> float:
    """Return the distance above the k-th eigenvalue within which a missing one is accepted."""
    return max(_MARGIN * tolerance * abs(kth), _MARGIN_OF_ROUNDING * rounding)


@dataclass(frozen=True, eq=False)
class LanczosResult:
    r"""The Krylov relation :math:`HQ = QT + RC^T` after some steps, with its estimates for H.

    The Ritz pairs :math:`(\theta, Qs)` come from :math:`Ts = \theta s`; their residuals are
    :math:`\|HQs - \theta Qs\| = \|RC^T s\|`.

    Attributes:
        projected: :math:`T = Q^T H Q`, (m, m), float64 on the CPU; tridiagonal with one start vector and no restart.
        remainders: Columns of R, orthogonal to Q, (P,) each, one for each start vector with an unexhausted space.
        tails: C, (m, number of remainders), float64.
        basis: Q, m orthonormal vectors or more, of which the first m count.
        first_projected: T of the first start vector alone, before the first restart or second start vector; None
            without them.
        forms: :math:`q_j^T H_s q_j` by basis vector and stratum of the operator, (m, S), float64; None after a restart.
        num_steps: Products with H.
        rounding: Size of the rounding errors, 1e-5 (float32) or 1e-10 (float64) times the norm of T. It is a lower
            bound of the reported residuals.
        asymmetry: Norm of :math:`Q^T (H - H^T) Q / 2`, from the products of the iteration. For a true Hessian it is
            rounding. A larger value shows that the operator is not the derivative of a gradient. It is a lower bound of
            the reported residuals.
        num_eigenvalues: Requested number k of eigenvalues.
        tolerance: Requested bound of the relative residuals.
        is_complete: Whether a check from a new random vector found no missing eigenvalue above the k-th.
        num_check_steps: Products that checked for missing eigenvalues, a part of ``num_steps``.
        pass_seconds: Seconds of the last pass over the basis.
        known_gram: :math:`R^T R` where ``remainders`` was released; None otherwise.
    """

    projected: Tensor
    remainders: tuple[Tensor, ...]
    tails: Tensor
    basis: Basis
    first_projected: Tensor | None
    forms: Tensor | None
    num_steps: int
    rounding: float
    asymmetry: float
    num_eigenvalues: int
    tolerance: float
    is_complete: bool
    num_check_steps: int
    pass_seconds: float
    known_gram: Tensor | None = None

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All m Ritz values, ascending, and the eigenvectors of T in columns; float64."""
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @property
    def dim(self) -> int:
        """P, the order of H."""
        return self.basis.dim

    @property
    def margin(self) -> float:
        """Distance above the k-th eigenvalue within which others may be missing."""
        return margin_of(self.eigenvalues[-1], self.tolerance, self.rounding)

    @property
    def is_whole(self) -> bool:
        """True if the basis spans the whole space."""
        return len(self.projected) == self.dim

    @property
    def quadrature(self) -> Tensor:
        """Tridiagonal T of the first start vector, whose Gauss quadrature gives the density; (n, n)."""
        return self.projected if self.is_whole or self.first_projected is None else self.first_projected

    @property
    def known_above(self) -> tuple[tuple[float, float], ...]:
        """All eigenvalues above the k-th with their residual norms, if known to be complete; otherwise none."""
        if not self.converged:
            return ()
        lowest = self.eigenvalues[-1]
        level = lowest + max(2 * self.tolerance * abs(lowest), self.rounding)
        norms = self.residual_norms.flip(0).tolist()
        return tuple(pair for pair in zip(self.eigenvalues, norms, strict=False) if pair[0] > level)

    @cached_property
    def remainder_gram(self) -> Tensor:
        """:math:`R^T R`, float64."""
        if self.known_gram is not None:
            return self.known_gram
        count = len(self.remainders)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i, left in enumerate(self.remainders):
            for j, right in enumerate(self.remainders[: i + 1]):
                gram[i, j] = gram[j, i] = dot(left, right)
        return gram

    @cached_property
    def bare_residual_norms(self) -> Tensor:
        """Residual norms of all m Ritz pairs from the relation alone, in the order of ``ritz``."""
        coefficients = self.tails.T @ self.ritz[1]
        return (coefficients * (self.remainder_gram @ coefficients)).sum(0).clamp_min(0).sqrt()

    @cached_property
    def residual_norms(self) -> Tensor:
        """``bare_residual_norms``, but at least ``rounding`` and ``asymmetry``."""
        return self.bare_residual_norms.clamp_min(max(self.rounding, self.asymmetry))

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """The k algebraically largest Ritz values, descending; fewer after fewer steps."""
        return tuple(self.ritz[0].flip(0)[: self.num_eigenvalues].tolist())

    @property
    def residuals(self) -> tuple[float, ...]:
        r"""Relative residuals :math:`\|Hv - \lambda v\| / |\lambda|` of ``eigenvalues``."""
        return tuple(self._relative_residuals().flip(0)[: self.num_eigenvalues].tolist())

    @property
    def is_accurate(self) -> bool:
        """True if the k largest eigenvalues met the tolerance; see `have_converged`."""
        return self._are_accurate(self.residual_norms.flip(0)[: self.num_eigenvalues].tolist())

    @property
    def converged(self) -> bool:
        """True if the k largest eigenvalues met the tolerance and none of them is missing."""
        return self.is_accurate and self.is_complete

    def have_converged(self, norms: Sequence[float]) -> bool:
        """Return whether the k largest eigenvalues are complete and accurate with these residual norms.

        An eigenvalue that is zero up to rounding counts as accurate in float64 only. There it is less than 1e-10 of the
        norm of H, while float32 hides eigenvalues of 1e-5 of the norm.
        """
        return self.is_complete and self._are_accurate(norms)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self.ritz[0][0])

    @property
    def lambda_min_residual(self) -> float:
        """Relative residual of ``lambda_min``, which has no tolerance."""
        return float(self._relative_residuals()[0])

    @property
    def coefficients(self) -> Tensor:
        """Coordinates of the Ritz vectors of ``eigenvalues`` in the basis, (k, m), float64."""
        return self.ritz[1].flip(1)[:, : self.num_eigenvalues].T

    @property
    def frobenius_square(self) -> float:
        r""":math:`\|HQ\|_F^2`, the part of :math:`\|H\|_F^2` on the basis."""
        rest = (self.tails.T @ self.tails * self.remainder_gram).sum()
        return float(self.projected.square().sum() + rest)

    def block_trace(self, places: Sequence[slice]) -> float:
        r"""Return :math:`\operatorname{tr} Q^T P H Q` for the projection P on some places, without a product."""
        size = len(self.projected)
        gram = self.basis.gram(places, self.remainders)
        within, across = gram[:size, :size], gram[:size, len(self.basis) :]
        return float((within * self.projected).sum() + (across * self.tails).sum())

    def vectors(self) -> Tensor:
        """Return the unit Ritz vectors of ``eigenvalues``, shape (k, P)."""
        return self.basis.combined(self.coefficients)

    def condensed(self) -> "LanczosResult":
        """Return this result with the vectors of its eigenvalues and the smallest one alone, without the remainders.

        They replace the basis in place, so do not use this object afterwards.
        """
        values, vectors = self.ritz
        size = len(values)
        kept = torch.tensor(sorted({0, *range(max(size - self.num_eigenvalues, 0), size)}))
        gram = self.remainder_gram
        self.basis.replace(vectors[:, kept].T)
        return replace(
            self,
            projected=torch.diag(values[kept]),
            tails=vectors[:, kept].T @ self.tails,
            first_projected=self.quadrature,
            forms=None,
            remainders=(),
            known_gram=gram,
        )

    def _are_accurate(self, norms: Sequence[float]) -> bool:
        if len(self.projected) < self.num_eigenvalues:
            return False
        zero = self.rounding if self.basis.dtype == torch.float64 else 0.0
        return all(
            norm <= self.tolerance * abs(value) or max(norm, abs(value)) <= zero
            for norm, value in zip(norms, self.eigenvalues, strict=True)
        )

    def _relative_residuals(self) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny
        return self.residual_norms / self.ritz[0].abs().clamp_min(tiny)
