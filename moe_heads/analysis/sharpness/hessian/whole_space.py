"""Krylov relation of the whole space of a small model, where random probes leave the trace uncertain."""

import torch

from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.lanczos import lanczos
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["whole_space"]

# Above this number of parameters, the passes over the basis take longer than the products.
_MOST_PARAMETERS = 500


def whole_space(
    operator: SymmetricOperator,
    krylov: LanczosResult,
    *,
    generator: torch.Generator,
    max_steps: int,
    basis_memory: int | None,
) -> LanczosResult | None:
    """Return an iteration over all dimensions that a random vector reaches, on which the trace is exact up to rounding.

    If the matrix has a multiple eigenvalue, such as zero, some dimensions are left, on which it is a multiple of the
    identity or nearly so. Probes find their part of the trace with little variance.

    Args:
        operator: The matrix.
        krylov: An earlier iteration.
        generator: Source of the start vectors.
        max_steps: Maximum number of steps.
        basis_memory: Bytes for the basis; see `lanczos`.

    Returns:
        The iteration; None for more than 500 parameters or ``max_steps``, and without memory for P vectors.
    """
    size = operator.shape[0]
    if krylov.is_whole or size > min(_MOST_PARAMETERS, max_steps):
        return None
    if basis_memory is not None and basis_memory < size * size * operator.dtype.itemsize:
        return None
    return lanczos(
        operator,
        generator=generator,
        num_eigenvalues=krylov.num_eigenvalues,
        tolerance=krylov.tolerance,
        min_steps=size,
        max_steps=size,
        basis_memory=basis_memory,
    )
