"""Lanczos iteration with several start vectors, full reorthogonalization and thick restarts."""

import math
import time

import torch
from torch import Tensor

from moe_heads.analysis._shared.microbatches import unless_out_of_memory
from moe_heads.analysis.sharpness.hessian.basis import Basis, dot, norm, rademacher
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator

__all__ = ["MIN_EXTRA_VECTORS", "KrylovIteration"]

# Rounding errors over the norm of the matrix. In a complete Krylov space the remainder grows from the error of a
# product with each step, about ten thousandfold in a dozen steps. In float64 the limit leaves room for this growth.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}

# Remainders below this share of the norm of the matrix have lost digits, and are orthogonalized again before use.
_SMALL_REMAINDER = 1e-3

# Ritz vectors that a restart keeps in addition to the k largest, if there is room.
_EXTRA_KEPT = 3

MIN_EXTRA_VECTORS = 3
"""Minimum room for vectors in addition to the k largest. With less, a restart leaves no room for a further step."""


class KrylovIteration:
    """State of a Lanczos iteration between two steps.

    Args:
        operator: The matrix.
        generator: Source of the random start vectors.
        num_eigenvalues: Number k of largest eigenvalues that a restart has to keep.
        tolerance: For the results.
        most_vectors: Maximum number of vectors, at which the basis is restarted.
        start: The first start vector; by default random signs.

    Attributes:
        num_steps: Products so far.
        num_sequences: Start vectors so far.
        remainders: Remainder of the last product of each sequence, orthogonal to the basis; see `LanczosResult`.
        active: Index in ``remainders`` of that of the last product; None if it is zero.
        num_check_steps: Products that checked for missing eigenvalues, a part of ``num_steps``.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        generator: torch.Generator,
        num_eigenvalues: int,
        tolerance: float,
        most_vectors: int,
        start: Tensor | None,
    ) -> None:
        self._operator, self._generator = operator, generator
        self._num_eigenvalues, self._tolerance, self._most_vectors = num_eigenvalues, tolerance, most_vectors
        self.basis = Basis(operator.shape[0], operator.dtype, operator.device)
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.remainders: list[Tensor] = []
        self.tails = torch.zeros(0, 0, dtype=torch.float64)
        self.active: int | None = None
        self._scale = self._pass_seconds = 0.0
        self._skew: list[Tensor] = []
        self._skew_before = 0.0
        self._first_projected: Tensor | None = None
        self._forms: list[Tensor] | None = []
        self.num_steps, self.num_sequences, self.num_check_steps = 0, 1, 0
        # the next vector, and the length by which it has to be divided
        self._following, self._length = self.fresh(start), 1.0

    @property
    def is_whole(self) -> bool:
        """True if the basis spans the whole space."""
        return len(self.basis) == self._operator.shape[0]

    @property
    def dim(self) -> int:
        """P, the order of the matrix."""
        return self.basis.dim

    @property
    def num_spare(self) -> int:
        """Number of vectors that may be held in addition to the basis."""
        return max(self._most_vectors - self._num_held, 0)

    @property
    def _num_held(self) -> int:
        return len(self.basis) + self._num_behind

    @property
    def _num_behind(self) -> int:
        """Number of remainders besides the one that the iteration continues from."""
        return max(len(self.remainders) - 1, 0)

    @property
    def rounding(self) -> float:
        """Size of the rounding errors; see `LanczosResult`."""
        return _ROUNDING[self._operator.dtype] * self._scale

    def step(self) -> None:
        """Add the next vector to the basis, and orthogonalize its product with the matrix against the basis."""
        size = len(self.projected)
        # Vectors of a large model fill the memory, so the only copy of this one is in the basis.
        self.basis.append(self._following, self._length)
        vector, self._following = self.basis[-1], self._following.new_empty(0)
        # H is symmetric, so the remainders of earlier products give their couplings to this vector.
        couplings = torch.tensor([dot(r, vector) for r in self.remainders], dtype=torch.float64)
        column = self.tails @ couplings if size else torch.zeros(0, dtype=torch.float64)
        remaining = [place for place in range(len(self.remainders)) if place != self.active]
        self.remainders = [self.remainders[i].sub(vector, alpha=float(couplings[i])) for i in remaining]
        self.tails = torch.cat([self.tails[:, remaining], torch.zeros(1, len(remaining), dtype=torch.float64)])
        product = self._operator.matvec(vector)
        self.num_steps += 1
        if self._forms is not None:
            self._forms.append(self._operator.forms)
        alpha = dot(vector, product)
        # With the two large terms subtracted first, one pass over the whole basis is mostly enough.
        product.sub_(vector, alpha=alpha)
        expected = column.clone()
        if size:
            product.sub_(self.basis[-2], alpha=float(column[-1]))
            expected[-1] = 0
        began = time.perf_counter()
        remainder, found = self.basis.split(product, in_place=True)
        self._pass_seconds = time.perf_counter() - began
        coefficients = found.to("cpu", torch.float64)
        self._skew.append(coefficients[:-1] - expected)
        grown = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        grown[:size, :size] = self.projected
        grown[:size, size] = grown[size, :size] = column
        grown[size, size] = alpha + float(coefficients[-1])
        self.projected = grown
        beta = norm(remainder)
        # The largest entry of T is its norm up to a factor of three.
        self._scale = max(self._scale, abs(alpha), beta)
        self.active = None
        if beta <= self.rounding or self.is_whole:
            beta = 0.0
        else:
            self.active = len(self.remainders)
            self.remainders.append(remainder)
            last = torch.eye(size + 1, dtype=torch.float64)[:, -1:]
            self.tails = torch.cat([self.tails, last], dim=1)

    def proceed(self, place: int) -> bool:
        """Continue from a remainder.

        Returns:
            Whether the basis was restarted.
        """
        is_full = self._restarted()
        self.active = place
        self._following, self._length = self.remainders[place], norm(self.remainders[place])
        if self._length < _SMALL_REMAINDER * self._scale:
            self._following, self._length = self._orthonormal(self._following), 1.0
        return is_full

    def begin(self) -> bool:
        """Continue from a new random vector, orthogonal to the basis.

        Returns:
            Whether the basis was restarted.
        """
        self._keep_first_projected()
        is_full = self._restarted()
        self.num_sequences += 1
        self.active = None
        self._following, self._length = self.fresh(None), 1.0
        return is_full

    def result(self, *, is_complete: bool) -> LanczosResult:
        """Return the result so far."""
        return LanczosResult(
            projected=self.projected,
            remainders=tuple(self.remainders),
            tails=self.tails,
            basis=self.basis,
            first_projected=self._first_projected,
            forms=torch.stack(self._forms) if self._forms else None,
            num_steps=self.num_steps,
            rounding=self.rounding,
            asymmetry=self._asymmetry(),
            num_eigenvalues=self._num_eigenvalues,
            tolerance=self._tolerance,
            is_complete=is_complete,
            pass_seconds=self._pass_seconds,
            num_check_steps=self.num_check_steps,
        )

    def make_room(self, count: int) -> bool:
        """Restart the basis with fewer vectors, unless that many can be held in addition to it.

        Returns:
            Whether it was restarted.
        """
        if self.num_spare >= count:
            return False
        self._restart(max(self._num_eigenvalues + 1, self._most_vectors - self._num_behind - count))
        return True

    def residual_gram(self) -> Tensor:
        """Return the Gram matrix of the columns of HQ - QT, (m, m), float64."""
        return self.tails @ self.result(is_complete=False).remainder_gram @ self.tails.T

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ascending Ritz values, their residual norms, and the part of each remainder in these, (R, m)."""
        found = self.result(is_complete=False)
        norms = found.remainder_gram.diagonal().sqrt()
        return found.ritz[0], found.bare_residual_norms, (self.tails.T @ found.ritz[1]).abs() * norms[:, None]

    def fresh(self, start: Tensor | None = None, *, is_normal: bool = False) -> Tensor:
        """Return a unit vector orthogonal to the basis, from the start vector, random signs or normal numbers."""
        dim, dtype, device = self._operator.shape[0], self._operator.dtype, self._operator.device
        if start is not None:
            vector = start.to(device, dtype)
        elif is_normal:
            vector = torch.randn(dim, generator=self._generator, dtype=dtype).to(device)
        else:
            vector = rademacher(dim, dtype, device, self._generator)
        length = norm(vector)
        vector = self.basis.complement(vector, in_place=start is None)
        while norm(vector) < 1e-4 * length:
            # In a small space a vector of signs may lie in the basis. One of normal numbers does not.
            vector = torch.randn(dim, generator=self._generator, dtype=dtype).to(device)
            length, vector = norm(vector), self.basis.complement(vector, in_place=True)
        return self._orthonormal(vector)

    def _orthonormal(self, vector: Tensor) -> Tensor:
        """Return a unit vector orthogonal to the basis, from one whose part outside the basis is small and inexact."""
        for _ in range(2):
            vector = self.basis.complement(vector / norm(vector), in_place=True)
        return vector.div_(norm(vector))

    def _asymmetry(self) -> float:
        """Return the norm of the antisymmetric part of the products, the largest over the restarts."""
        size = max((len(column) for column in self._skew), default=0) + 1
        skew = torch.zeros(size, size, dtype=torch.float64)
        for column in self._skew:
            skew[: len(column), len(column)] = column / 2
        norm_now = float(torch.linalg.matrix_norm(skew - skew.T, 2)) if bool(skew.isfinite().all()) else math.inf
        return max(self._skew_before, norm_now)

    def _keep_first_projected(self) -> None:
        if self._first_projected is None:
            self._first_projected = self.projected

    def _restarted(self) -> bool:
        """Make room for another vector. Return whether that took a restart, which keeps the largest Ritz vectors."""
        held = self._num_held
        if held < self._most_vectors and unless_out_of_memory(self.basis.reserve) is not None:
            return False
        k = self._num_eigenvalues
        # If memory ran out below the limit, this number is the limit.
        self._most_vectors = min(self._most_vectors, held)
        if self._most_vectors < k + MIN_EXTRA_VECTORS:
            raise MemoryError(
                f"there is no memory for more than {self._most_vectors} vectors of {self._operator.shape[0]} numbers."
                " Analyze fewer parameters (params), or use another device."
            )
        spare = self._most_vectors - self._num_behind
        self._restart(max(min(k + _EXTRA_KEPT, spare - 2), spare // 2, min(k + 1, len(self.projected))))
        return True

    def _restart(self, count: int) -> None:
        """Replace the basis by the Ritz vectors of the k largest values and of others of large magnitude."""
        self._keep_first_projected()
        k = self._num_eigenvalues
        values, vectors = torch.linalg.eigh(self.projected)
        order = values.abs()
        order[-k:] = torch.inf
        kept = order.topk(min(count, len(values))).indices.sort().values
        self._skew_before, self._skew = self._asymmetry(), []
        self.basis.replace(vectors[:, kept].T)
        self.projected = torch.diag(values[kept])
        self.tails = vectors[:, kept].T @ self.tails
        self._forms = None
