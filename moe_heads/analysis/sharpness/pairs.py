"""Eigenpairs of a result, from one or both ends of the spectrum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.certificate import Certificate
from moe_heads.analysis.sharpness.hessian.both_ends import LowerEnd, by_magnitude
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult

__all__ = ["Eigenpairs", "eigenpairs"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues with the norms of their residuals.

    Attributes:
        values: The eigenvalues in their order.
        norms: The norms.
        have_converged: Whether all of them met the tolerance, and none is missing.
        krylov: Source of the largest eigenvalues.
        lower: Source of the smallest ones, or None.
        places: Places of the eigenvalues in the two sources put together; None for those of ``krylov``.
    """

    values: tuple[float, ...]
    norms: tuple[float, ...]
    have_converged: bool
    krylov: LanczosResult
    lower: LowerEnd | None = None
    places: tuple[int, ...] | None = None

    def vectors(self) -> Tensor:
        """Return the unit eigenvectors, (k, P)."""
        if self.lower is None or self.places is None:
            return self.krylov.vectors()
        count = len(self.krylov.eigenvalues)
        found = torch.empty(
            len(self.places), self.krylov.dim, dtype=self.krylov.basis.dtype, device=self.krylov.basis.device
        )
        for source, offset in ((self.krylov, 0), (self.lower.krylov, count)):
            if source is None:
                continue
            rows = [(row, place - offset) for row, place in enumerate(self.places) if (place < count) == (offset == 0)]
            if rows:
                own, wanted = zip(*rows, strict=True)
                found[list(own)] = source.basis.combined(source.coefficients[list(wanted)])
        return found


def eigenpairs(
    krylov: LanczosResult, lower: LowerEnd | None, certificate: Certificate, *, rounding: float, true_residual: float
) -> Eigenpairs:
    """Return the eigenpairs of a result.

    Args:
        krylov: Result of the iteration for the k largest eigenvalues.
        lower: Result for the smallest eigenvalues, to select the k of largest magnitude; None for the k largest.
        certificate: Checks of the products.
        rounding: Contribution of rounding to a residual.
        true_residual: Lower bound of the residual norm of the largest eigenvalue.
    """
    upper = krylov.eigenvalues
    norms = _norms(krylov, upper, certificate, rounding)
    norms[0] = max(norms[0], true_residual)
    if lower is None:
        return Eigenpairs(upper, tuple(norms), krylov.have_converged(norms), krylov)
    if lower.krylov is not None:
        norms += _norms(lower.krylov, lower.eigenvalues, certificate, rounding)
    places = tuple(by_magnitude(upper, lower.eigenvalues, krylov.num_eigenvalues))
    values = tuple((*upper, *lower.eigenvalues)[place] for place in places)
    chosen = tuple(norms[place] for place in places)
    is_accurate = all(norm <= krylov.tolerance * abs(value) for norm, value in zip(chosen, values, strict=True))
    return Eigenpairs(values, chosen, lower.is_complete(krylov) and is_accurate, krylov, lower, places)


def _norms(krylov: LanczosResult, values: tuple[float, ...], certificate: Certificate, rounding: float) -> list[float]:
    """Return the residual norms of the eigenvalues, including the errors that the checks measured."""
    count = len(values)
    # An eigenvalue may be missing within this distance above the last one.
    margin = 0.0 if krylov.is_whole else krylov.margin
    norms = krylov.residual_norms.flip(0)[:count].clamp_min(margin).tolist()
    if math.isfinite(certificate.rounding):
        # Rounding was measured, which replaces its assumed size.
        bare = krylov.bare_residual_norms.flip(0)[:count].clamp_min(max(krylov.asymmetry, margin))
        norms = (bare + rounding).tolist()
    errors = map(certificate.error_of_derivatives, values)
    return [norm + error for norm, error in zip(norms, errors, strict=True)]
