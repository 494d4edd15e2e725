"""Lanczos iteration with full reorthogonalisation (Lanczos 1950; Parlett, The Symmetric Eigenvalue Problem, 1998).

Where the basis would outgrow its memory it is restarted thick (Wu and Simon 2000): the best Ritz vectors stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_heads.callbacks.functional.common.interrupts import HeldInterrupts
from moe_heads.callbacks.functional.common.memory import memory_budget
from moe_heads.callbacks.functional.common.microbatches import unless_out_of_memory
from moe_heads.callbacks.functional.curvature.basis import Basis, dot, norm, rademacher
from moe_heads.callbacks.functional.curvature.operator import SymmetricOperator
from moe_heads.checks import check_at_least, check_positive

__all__ = ["CPU_BASIS_MEMORY", "LanczosResult", "lanczos"]

CPU_BASIS_MEMORY = 4 * 2**30
"""Bytes that the basis may take on a CPU unless the caller says otherwise, or half of what is free."""

# Rounding errors over the norm of the matrix. What is left of a Krylov space that is complete grows with each step from
# the error of a product: some ten thousandfold in a dozen, which float64 can afford to call nothing.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}

# Vectors beyond the wanted ones that a restart keeps at least, and those that it needs for new steps.
_KEPT_BESIDES, _NEW_AFTER_RESTART = 3, 8


@dataclass(frozen=True, eq=False)
class LanczosResult:
    r"""The Krylov relation :math:`HQ = QT + r c^T` after some steps, and what it says about H.

    The Ritz pairs :math:`(\theta, Qs)` come from :math:`Ts = \theta s`; their residuals are
    :math:`\|HQs - \theta Qs\| = \|r\| |c^T s|`.

    Attributes:
        projected: :math:`T = Q^T H Q`, (m, m), float64 on the CPU; tridiagonal unless there was a restart.
        remainder: r, orthogonal to Q, (P,).
        beta: :math:`\|r\|`.
        tail: c, (m,), float64: the last unit vector, unless a restart came just before.
        basis: Q, m orthonormal vectors or more, of which the first m count.
        first_cycle: Nodes and weights from before the first restart; None where there was none.
        num_steps: Products with H.
        rounding: Size of the rounding errors, 1e-5 (float32) or 1e-10 (float64) times the norm of T. No residual is
            reported below it.
        num_eigenvalues: Number k of eigenvalues asked for.
        converged: Whether the k largest have met the tolerance.
    """

    projected: Tensor
    remainder: Tensor
    beta: float
    tail: Tensor
    basis: Basis
    first_cycle: tuple[Tensor, Tensor] | None
    num_steps: int
    rounding: float
    num_eigenvalues: int
    converged: bool

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All m Ritz values, ascending, and the eigenvectors of T in columns; float64."""
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @property
    def nodes(self) -> Tensor:
        """Gauss nodes of the quadrature of the start vector, ascending, float64: the Ritz values of the first cycle."""
        is_whole = len(self.projected) == len(self.remainder)
        return self.ritz[0] if is_whole or self.first_cycle is None else self.first_cycle[0]

    @property
    def weights(self) -> Tensor:
        """Weights of the nodes, which sum to 1; all the same where the nodes are all eigenvalues."""
        if len(self.projected) == len(self.remainder):
            return torch.full_like(self.nodes, 1 / len(self.nodes))
        return self.ritz[1][0].square() if self.first_cycle is None else self.first_cycle[1]

    @cached_property
    def residual_norms(self) -> Tensor:
        """Residual norms of all m Ritz pairs, in the order of ``ritz``, at least ``rounding``."""
        return (self.beta * (self.tail @ self.ritz[1]).abs()).clamp_min(self.rounding)

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

    @property
    def coefficients(self) -> Tensor:
        """Coordinates of the Ritz vectors of ``eigenvalues`` in the basis, (k, m), float64."""
        return self.ritz[1].flip(1)[:, : self.num_eigenvalues].T

    def gram(self, places: Sequence[slice]) -> tuple[Tensor, Tensor]:
        """:math:`Q P Q^T` and :math:`Q P r` for the projection P on some places of the vectors; float64 on the CPU."""
        size = len(self.projected)
        gram = self.basis.gram(places, self.remainder)
        return gram[:size, :size], gram[:size, -1]

    def vectors(self) -> Tensor:
        """Unit Ritz vectors of ``eigenvalues``, shape (k, P)."""
        return self.basis.combined(self.coefficients)

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
    start: Tensor | None = None,
    basis_memory: int | None = None,
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
        max_steps: Most steps.
        start: A start vector (P,) of your own, such as the sum of eigenvectors of a matrix nearby: fewer steps are
            needed, but the nodes and weights then say nothing of the density.
        basis_memory: Bytes that the basis may take; by default 4 GiB on a CPU and a quarter of the free memory on a
            GPU, and not more than half of what is free. A smaller basis is restarted and needs more steps.
        on_step: Called after each step with the result so far, which is not converged.

    Raises:
        ValueError: If an argument is out of range; ``num_eigenvalues`` must not exceed the dimension.
        MemoryError: If there is no memory for the fewest vectors that are needed.

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
    _check(dim, num_eigenvalues, tolerance, max_steps, start)
    most_vectors = _most_vectors(operator, num_eigenvalues, basis_memory)
    iteration = _Iteration(operator, generator, num_eigenvalues, most_vectors, start)
    while True:
        iteration.step()
        if on_step is not None:
            on_step(iteration.result(converged=False))
        if iteration.is_complete:
            return iteration.result(converged=True)
        is_settled = iteration.is_settled(tolerance)
        # More steps after an invariant subspace would add nothing to the density of the first start vector.
        if is_settled and (iteration.num_steps >= min_steps or iteration.first > 0):
            return iteration.result(converged=True)
        if iteration.num_steps == max_steps:
            return iteration.result(converged=is_settled)
        with HeldInterrupts():
            if iteration.advance() and on_step is not None:
                # the basis is another one: what was told before does not fit it any more
                on_step(iteration.result(converged=False))


class _Iteration:
    """The state between two steps.

    Attributes:
        num_steps: Products so far.
        first: Place in the basis of the start vector that the last steps come from; above 0 after an invariant
            subspace.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        generator: torch.Generator,
        num_eigenvalues: int,
        most_vectors: int,
        start: Tensor | None,
    ) -> None:
        self._operator, self._generator = operator, generator
        self._num_eigenvalues, self._most_vectors = num_eigenvalues, most_vectors
        self._basis = Basis(operator.shape[0], operator.dtype, operator.device)
        self._projected = torch.zeros(0, 0, dtype=torch.float64)
        self._remainder = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self._beta = self._rounding = self._scale = 0.0
        self._tail = torch.zeros(0, dtype=torch.float64)
        self._first_cycle: tuple[Tensor, Tensor] | None = None
        self.num_steps = self.first = 0
        self._following = self._fresh(start)

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return len(self._basis) == self._operator.shape[0]

    def step(self) -> None:
        """Add the following vector to the basis; one product with it, orthogonalised against the basis."""
        size = len(self._projected)
        self._basis.append(self._following)
        grown = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        grown[:size, :size] = self._projected
        grown[:size, size] = grown[size, :size] = self._beta * self._tail
        self._projected = grown
        product = self._operator.matvec(self._following)
        self.num_steps += 1
        alpha = dot(self._following, product)
        self._projected[-1, -1] = alpha
        # The three terms first: then one pass over the whole basis is mostly enough.
        product = product.sub(self._following, alpha=alpha)
        if size:
            product.sub_(self._basis[-2], alpha=float(self._projected[-2, -1]))
        self._remainder = self._basis.complement(product)
        self._beta = norm(self._remainder)
        self._tail = torch.eye(size + 1, dtype=torch.float64)[-1]
        # The largest entry of T is its norm up to a factor of three.
        self._scale = max(self._scale, abs(alpha), self._beta)
        self._rounding = _ROUNDING[self._operator.dtype] * self._scale
        if self.is_complete:
            self._beta = 0.0

    def advance(self) -> bool:
        """Find the following vector: what the product left, or a fresh one where that is nothing.

        Returns:
            Whether the basis was restarted.
        """
        if self._is_invariant:
            self._beta, self._remainder = 0.0, torch.zeros_like(self._remainder)
            self.first = len(self._basis)
        is_full = len(self._basis) >= self._most_vectors or unless_out_of_memory(self._basis.reserve) is None
        if is_full:
            self._restart()
        self._following = self._fresh(None) if self._beta == 0 else self._remainder / self._beta
        return is_full

    def is_settled(self, tolerance: float) -> bool:
        """Whether the wanted eigenvalues are accurate, and none is missing."""
        k = self._num_eigenvalues
        if len(self._projected) < k or (self._is_invariant and self.first == 0):
            return False
        top, is_accurate = self._accurate(self._projected, tolerance)
        if not bool(is_accurate[-k:].all()):
            return False
        if self.first == 0:
            return True
        # What no start vector has reached yet lies below the largest eigenvalue found from the last one.
        bound, is_bound_accurate = self._accurate(self._projected[self.first :, self.first :], tolerance)
        return bool(is_bound_accurate[-1]) and float(top[-k]) >= float(bound[-1]) - self._rounding

    def result(self, converged: bool) -> LanczosResult:
        """What is known now."""
        return LanczosResult(
            projected=self._projected,
            remainder=self._remainder,
            beta=self._beta,
            tail=self._tail,
            basis=self._basis,
            first_cycle=self._first_cycle,
            num_steps=self.num_steps,
            rounding=self._rounding,
            num_eigenvalues=self._num_eigenvalues,
            converged=converged,
        )

    @property
    def _is_invariant(self) -> bool:
        return self._beta <= self._rounding

    def _accurate(self, projected: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and whether each meets the tolerance."""
        values, vectors = torch.linalg.eigh(projected)
        limits = (tolerance * values.abs()).clamp_min(self._rounding)
        return values, torch.le(self._beta * vectors[-1].abs(), limits)

    def _fresh(self, start: Tensor | None) -> Tensor:
        """A unit vector orthogonal to the basis: of the start vector, or of random signs."""
        dim, dtype, device = self._operator.shape[0], self._operator.dtype, self._operator.device
        vector = rademacher(dim, dtype, device, self._generator) if start is None else start.to(device, dtype)
        length = norm(vector)
        vector = self._basis.complement(vector)
        while norm(vector) < 1e-4 * length:
            # in a small space signs may lie in the basis; normal numbers do not
            vector = torch.randn(dim, generator=self._generator, dtype=dtype).to(device)
            length, vector = norm(vector), self._basis.complement(vector)
        # Normalise, then once more: next to a nearly complete basis little is left of the vector, and that is inexact.
        for _ in range(2):
            vector = self._basis.complement(vector / norm(vector))
        return vector / norm(vector)

    def _restart(self) -> None:
        """Keep the Ritz vectors that matter most, of what is complete and of what grows from the last start vector."""
        if self._first_cycle is None:
            nodes, vectors = torch.linalg.eigh(self._projected)
            self._first_cycle = nodes, vectors[0].square()
        # where memory ran out before, this is all there is
        self._most_vectors = len(self._basis)
        if self._most_vectors < _fewest_vectors(self._num_eigenvalues):
            raise MemoryError(
                f"there is no memory for more than {self._most_vectors} vectors of {self._operator.shape[0]} numbers;"
                " analyse fewer parameters (params), or on another device"
            )
        k = self._num_eigenvalues
        complete, growing = self._projected[: self.first, : self.first], self._projected[self.first :, self.first :]
        old_values, old_vectors = _kept(complete, min(k, self.first), k)
        num_kept = max(k + _KEPT_BESIDES, (self._most_vectors - len(old_values)) // 2)
        values, vectors = _kept(growing, min(num_kept, len(growing)), k)
        self._basis.replace(torch.block_diag(old_vectors.T, vectors.T))
        self._projected = torch.diag(torch.cat([old_values, values]))
        self._tail = torch.cat([torch.zeros_like(old_values), vectors[-1]])
        self.first = len(old_values)


def _kept(projected: Tensor, count: int, num_wanted: int) -> tuple[Tensor, Tensor]:
    """Ritz pairs to keep, ascending: the wanted ones, and of the others those of the largest size."""
    values, vectors = torch.linalg.eigh(projected)
    order = values.abs()
    order[-num_wanted:] = torch.inf
    kept = order.topk(count).indices.sort().values
    return values[kept], vectors[:, kept]


def _fewest_vectors(num_eigenvalues: int) -> int:
    return 2 * num_eigenvalues + _KEPT_BESIDES + _NEW_AFTER_RESTART


def _most_vectors(operator: SymmetricOperator, num_eigenvalues: int, basis_memory: int | None) -> int:
    """Vectors that fit into the memory, at least those that the method needs."""
    if basis_memory is None:
        basis_memory = memory_budget(operator.device, on_cpu=CPU_BASIS_MEMORY, share_of_gpu=1 / 4)
    fitting = basis_memory // (operator.shape[0] * torch.finfo(operator.dtype).bits // 8)
    return max(fitting, _fewest_vectors(num_eigenvalues))


def _check(dim: int, num_eigenvalues: int, tolerance: float, max_steps: int, start: Tensor | None) -> None:
    check_at_least(1, num_eigenvalues=num_eigenvalues, max_steps=max_steps)
    if num_eigenvalues > dim:
        raise ValueError(f"num_eigenvalues: expected 1 to {dim}, the number of parameters; got {num_eigenvalues}")
    check_positive(tolerance=tolerance)
    if max_steps < num_eigenvalues:
        raise ValueError(f"max_steps: expected at least num_eigenvalues = {num_eigenvalues}; got {max_steps}")
    if start is not None and (start.shape != (dim,) or not bool(start.isfinite().all()) or not bool(start.any())):
        raise ValueError(
            f"start: expected a finite vector of shape ({dim},) that is not zero; got {tuple(start.shape)}"
        )
