"""The whole matrix of a small symmetric operator, as a Krylov relation that spans the whole space."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.basis import Basis
from moe_heads.analysis.sharpness.hessian.iteration import ROUNDING
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["completed", "dense"]

# Products between two intermediate results.
_PER_RESULT = 10


def dense(
    operator: SymmetricOperator,
    *,
    num_eigenvalues: int = 5,
    tolerance: float = 1e-3,
    on_step: Callable[[LanczosResult], None] | None = None,
    on_product: Callable[[], None] | None = None,
) -> LanczosResult:
    """Return all eigenvalues of a symmetric operator of order P, by P products with unit vectors.

    Nothing is random, and nothing is missing: the residuals are rounding and the asymmetry of the products.

    Args:
        operator: The matrix H.
        num_eigenvalues: Number of largest eigenvalues.
        tolerance: Largest relative residual of these.
        on_step: Called with the result so far, every ten products and at the end.
        on_product: Called after the other products.

    Returns:
        The relation of the whole space. On the way, that of the first unit vectors.
    """
    size = operator.shape[0]
    basis, columns, forms = Basis(size, operator.dtype, operator.device), [], []
    found: LanczosResult | None = None
    for place in range(size):
        unit = torch.zeros(size, dtype=operator.dtype, device=operator.device)
        unit[place] = 1
        columns.append(operator.matvec(unit))
        forms.append(operator.forms)
        basis.append(unit)
        is_last = place == size - 1
        if is_last or (on_step is not None and (place + 1) % _PER_RESULT == 0):
            found = _of_columns(basis, columns, forms, num_eigenvalues, tolerance)
            if on_step is not None:
                on_step(found)
        elif on_product is not None:
            on_product()
    assert found is not None
    return found


def completed(operator: SymmetricOperator, krylov: LanczosResult) -> LanczosResult:
    """Return the relation of the whole space, by products with an orthonormal basis of what a Krylov space leaves out.

    Args:
        operator: The matrix H of order P.
        krylov: Result of `lanczos` on the same operator, with m vectors. P - m products are made.
    """
    size, dim = len(krylov.projected), krylov.dim
    known = krylov.basis.combined(torch.eye(size, dtype=torch.float64))
    # of the complete orthogonal factor, the columns behind the first m span the complement
    factor = torch.linalg.qr(known.double().cpu().T, mode="complete")[0]
    rest = factor[:, size:].T.to(operator.device, operator.dtype)
    products, forms = [], []
    for vector in rest:
        products.append(operator.matvec(vector))
        forms.append(operator.forms)
    vectors = torch.cat([known, rest])
    basis = Basis(dim, operator.dtype, operator.device)
    for vector in vectors:
        basis.append(vector)
    coupled = (vectors.double() @ torch.stack(products).double().T).cpu()  # (P, P - m)
    projected = torch.zeros(dim, dim, dtype=torch.float64)
    projected[:size, :size] = krylov.projected
    projected[:, size:] = coupled
    projected[size:, :size] = coupled[:size].T
    asymmetry = max(krylov.asymmetry, _asymmetry(coupled[size:]))
    projected[size:, size:] = (coupled[size:] + coupled[size:].T) / 2
    return replace(
        krylov,
        projected=projected,
        remainders=(),
        tails=torch.zeros(dim, 0, dtype=torch.float64),
        basis=basis,
        first_projected=None,
        forms=None if krylov.forms is None else torch.cat([krylov.forms, torch.stack(forms)]),
        num_steps=krylov.num_steps + dim - size,
        rounding=_rounding(operator.dtype, projected),
        asymmetry=asymmetry,
        is_complete=True,
    )


def _of_columns(
    basis: Basis, columns: list[Tensor], forms: list[Tensor], num_eigenvalues: int, tolerance: float
) -> LanczosResult:
    count = len(columns)
    # copies, because further vectors follow
    matrix = torch.stack(columns, dim=1)
    square = matrix[:count].to("cpu", torch.float64)
    outside = matrix.clone()
    outside[:count] = 0
    is_whole = count == basis.dim
    projected = (square + square.T) / 2
    return LanczosResult(
        projected=projected,
        remainders=() if is_whole else tuple(outside.T),
        tails=torch.zeros(count, 0, dtype=torch.float64) if is_whole else torch.eye(count, dtype=torch.float64),
        basis=basis,
        first_projected=None,
        forms=torch.stack(forms),
        num_steps=count,
        rounding=_rounding(basis.dtype, projected),
        asymmetry=_asymmetry(square),
        num_eigenvalues=num_eigenvalues,
        tolerance=tolerance,
        is_complete=is_whole,
        num_check_steps=0,
        pass_seconds=0.0,
    )


def _rounding(dtype: torch.dtype, matrix: Tensor) -> float:
    return ROUNDING[dtype] * float(torch.linalg.matrix_norm(matrix, 2))


def _asymmetry(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm((matrix - matrix.T) / 2, 2))
