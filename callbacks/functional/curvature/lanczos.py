"""Lanczos iteration with full reorthogonalisation (Lanczos 1950; Parlett, The Symmetric Eigenvalue Problem, 1998)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_heads.callbacks.functional.curvature.basis import Basis, dot, norm, rademacher
from moe_heads.callbacks.functional.curvature.operator import SymmetricOperator

__all__ = ["LanczosResult", "lanczos"]


@dataclass(frozen=True, eq=False)
class LanczosResult:
    r"""The Krylov relation :math:`HQ = QT + \beta_m q_{m+1} e_m^T` after m steps, and what it says about H.

    The Ritz pairs :math:`(\theta, Qs)` come from :math:`Ts = \theta s`; their residuals are
    :math:`\|HQs - \theta Qs\| = \beta_m |s_m|`.

    Attributes:
        alphas: Diagonal of T, shape (m,), float64 on the CPU.
        betas: Off-diagonal of T and, last, :math:`\beta_m`; shape (m,), float64 on the CPU. A zero before the last
            place marks where an invariant subspace was complete and the iteration went on with a fresh vector.
        basis: Q, m orthonormal vectors.
        rounding: Size of the rounding errors of a product, ten units of the dtype's precision times the norm of T. No
            residual is reported below it.
        num_eigenvalues: Number k of eigenvalues asked for.
        converged: Whether the k largest have met the tolerance.
    """

    alphas: Tensor
    betas: Tensor
    basis: Basis
    rounding: float
    num_eigenvalues: int
    converged: bool

    @property
    def num_steps(self) -> int:
        """M, the number of products with H."""
        return len(self.alphas)

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All m Ritz values, ascending, and the eigenvectors of T in columns; float64."""
        values, vectors = torch.linalg.eigh(_tridiagonal(self.alphas, self.betas))
        return values, vectors

    @cached_property
    def residual_norms(self) -> Tensor:
        """Residual norms of all m Ritz pairs, in the order of ``ritz``, at least ``rounding``."""
        return (self.betas[-1] * self.ritz[1][-1].abs()).clamp_min(self.rounding)

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """The k algebraically largest Ritz values, descending; fewer after fewer steps."""
        return tuple(self.ritz[0].flip(0)[: self.num_eigenvalues].tolist())

    @property
    def residuals(self) -> tuple[float, ...]:
        r"""Relative residuals :math:`\|Hv - \lambda v\| / |\lambda|` of ``eigenvalues``."""
        return tuple(self._relative_residuals().flip(0)[: self.num_eigenvalues].tolist())

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self.ritz[0][0])

    @property
    def lambda_min_residual(self) -> float:
        """Relative residual of ``lambda_min``; the iteration does not wait for it."""
        return float(self._relative_residuals()[0])

    def vectors(self) -> Tensor:
        """Unit Ritz vectors of ``eigenvalues``, shape (k, P)."""
        return self.basis.combined(self.ritz[1].flip(1)[:, : self.num_eigenvalues].T)

    def _relative_residuals(self) -> Tensor:
        return self.residual_norms / self.ritz[0].abs().clamp_min(torch.finfo(torch.float64).tiny)


def lanczos(
    operator: SymmetricOperator,
    *,
    generator: torch.Generator,
    num_eigenvalues: int = 5,
    tolerance: float = 1e-3,
    min_steps: int = 0,
    max_steps: int = 200,
    on_step: Callable[[LanczosResult], None] | None = None,
) -> LanczosResult:
    r"""Largest eigenvalues of a symmetric operator, one product a step.

    Stops when the k algebraically largest Ritz pairs all have :math:`\|Hv - \lambda v\| \le` ``tolerance``
    :math:`|\lambda|`, or a residual at the level of rounding (which matters for eigenvalues that are zero). When the
    Krylov space becomes invariant before, the iteration goes on from a fresh vector orthogonal to it until no
    eigenvalue outside can belong to the top k. That finds multiple eigenvalues of an operator with few distinct ones;
    in a rich spectrum an eigenvalue that is repeated exactly shows its second copy only through rounding, some steps
    later.

    Args:
        operator: The matrix H.
        generator: Source of the Rademacher start vector, a CPU generator; equal states give equal results.
        num_eigenvalues: k. Five, as in the top-5 eigenvalues that papers on sharpness report.
        tolerance: Largest relative residual. 1e-3 puts the error of an isolated eigenvalue near 1e-6.
        min_steps: Steps to take even when converged (a spectral density wants about 40).
        max_steps: Most steps. The basis takes that many vectors of memory.
        on_step: Called after each step with the result so far, which is not converged.

    Raises:
        ValueError: If an argument is out of range; ``num_eigenvalues`` must not exceed the dimension.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.curvature import HessianOperator, lanczos
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> hessian = HessianOperator(model, lambda m, batch: m(batch).square().sum() / 2, [x])
        >>> result = lanczos(hessian, generator=torch.Generator().manual_seed(0), num_eigenvalues=2)
        >>> [round(value, 4) for value in result.eigenvalues]
        [9.0, 4.0]
    """
    dim = operator.shape[0]
    _check(dim, num_eigenvalues, tolerance, max_steps)
    basis = Basis(dim, operator.dtype, operator.device)
    alphas: list[float] = []
    betas: list[float] = []
    block = 0  # first row of T that belongs to the current start vector
    following = _start(basis, dim, operator, generator)
    while True:
        basis.append(following)
        product = operator.matvec(basis.last)
        alphas.append(dot(basis.last, product))
        following = basis.complement(product)
        betas.append(norm(following))
        # The largest entry of T is its norm up to a factor of three.
        rounding = 10 * torch.finfo(operator.dtype).eps * max(map(abs, [*alphas, *betas]))
        if on_step is not None:
            on_step(_result(alphas, betas, basis, rounding, num_eigenvalues, False))
        is_invariant = betas[-1] <= rounding
        if len(basis) == dim:
            betas[-1] = 0.0
            return _result(alphas, betas, basis, rounding, num_eigenvalues, True)
        is_settled = (not is_invariant or block > 0) and _settled(
            alphas, betas, block, num_eigenvalues, tolerance, rounding
        )
        # More steps after an invariant subspace would add nothing to the density of the first start vector.
        if is_settled and (len(basis) >= min_steps or block > 0):
            return _result(alphas, betas, basis, rounding, num_eigenvalues, True)
        if len(basis) == max_steps:
            return _result(alphas, betas, basis, rounding, num_eigenvalues, is_settled)
        if is_invariant:
            betas[-1] = 0.0
            block = len(basis)
            following = _start(basis, dim, operator, generator)
        else:
            following = following / betas[-1]


def _check(dim: int, num_eigenvalues: int, tolerance: float, max_steps: int) -> None:
    if not 1 <= num_eigenvalues <= dim:
        raise ValueError(f"num_eigenvalues: expected 1 to {dim}, the number of parameters; got {num_eigenvalues}")
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number; got {tolerance}")
    if max_steps < num_eigenvalues:
        raise ValueError(f"max_steps: expected at least num_eigenvalues = {num_eigenvalues}; got {max_steps}")


def _start(basis: Basis, dim: int, operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    vector = basis.complement(rademacher(dim, operator.dtype, operator.device, generator))
    # Normalise, then once more: next to a nearly complete basis little is left of the vector, and that is inexact.
    for _ in range(2):
        vector = basis.complement(vector / norm(vector))
    return vector / norm(vector)


def _settled(alphas: list[float], betas: list[float], block: int, k: int, tolerance: float, rounding: float) -> bool:
    if len(alphas) < k:
        return False
    top, is_accurate = _accurate(alphas, betas, tolerance, rounding)
    if not bool(is_accurate[-k:].all()):
        return False
    if block == 0:
        return True
    # What no start vector has reached yet lies below the largest eigenvalue found from the last one.
    bound, is_bound_accurate = _accurate(alphas[block:], betas[block:], tolerance, rounding)
    return bool(is_bound_accurate[-1]) and float(top[-k]) >= float(bound[-1]) - rounding


def _accurate(alphas: list[float], betas: list[float], tolerance: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and whether each meets the tolerance."""
    values, vectors = torch.linalg.eigh(_tridiagonal(_float64(alphas), _float64(betas)))
    limits = (tolerance * values.abs()).clamp_min(rounding)
    return values, torch.le(betas[-1] * vectors[-1].abs(), limits)


def _tridiagonal(alphas: Tensor, betas: Tensor) -> Tensor:
    return torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)


def _result(
    alphas: list[float], betas: list[float], basis: Basis, rounding: float, k: int, converged: bool
) -> LanczosResult:
    return LanczosResult(_float64(alphas), _float64(betas), basis, rounding, k, converged)


def _float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
