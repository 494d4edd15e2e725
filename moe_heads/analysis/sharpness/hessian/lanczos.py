"""Lanczos iteration with full reorthogonalization (Lanczos 1950; Parlett, The Symmetric Eigenvalue Problem, 1998).

When the basis reaches its memory limit, a thick restart (Wu and Simon 2000) keeps the best Ritz vectors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.memory import available_memory, memory_budget
from moe_heads.analysis.sharpness.hessian.completeness import CHANCE_OF_MISSING, NUM_OUTSIDE, CompletenessCheck
from moe_heads.analysis.sharpness.hessian.iteration import MIN_EXTRA_VECTORS, KrylovIteration
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator
from moe_heads.checks import check_at_least, check_positive

__all__ = ["CHANCE_OF_MISSING", "CPU_BASIS_MEMORY", "LanczosResult", "check_basis_memory", "lanczos"]

CPU_BASIS_MEMORY = 5 * 2**29
"""Default number of bytes of the basis on a CPU, unless half of the free memory is less."""


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
    has_settled: Callable[[LanczosResult], bool] | None = None,
    on_step: Callable[[LanczosResult], None] | None = None,
) -> LanczosResult:
    r"""Return the largest eigenvalues of a symmetric operator, with one product per step.

    The iteration continues until the k algebraically largest Ritz pairs all have :math:`\|Hv - \lambda v\| \le`
    ``tolerance`` :math:`|\lambda|`, or a residual at the level of rounding. A Krylov space holds only one copy of a
    repeated eigenvalue, and finds an eigenvalue late if its start vector has a small part there. So some steps from a
    random vector orthogonal to the basis then search for an eigenvalue above the k-th outside (`CompletenessCheck`). If
    there is one, the iteration continues from a further start vector until it finds it.

    Args:
        operator: The matrix H.
        generator: Source of the Rademacher start vectors, a CPU generator; equal states give equal results.
        num_eigenvalues: k. Five, as in the top-5 eigenvalues that papers on sharpness report.
        tolerance: Largest relative residual. With 1e-3 the error of an isolated eigenvalue is near 1e-6.
        min_steps: Minimum number of steps from the first vector. A spectral density needs up to 40.
        max_steps: Maximum number of steps in total.
        start: A start vector (P,), such as the sum of eigenvectors of a similar matrix. It saves steps, but the nodes
            and weights then do not give the density.
        basis_memory: Maximum number of bytes of the basis. The default is 2.5 GiB on a CPU and a quarter of the free
            memory on a GPU, at most half of the free memory, but at least the size of k + 3 vectors. A smaller basis is
            restarted and needs more steps.
        has_settled: Ends the minimum number of steps early where it returns True of the result so far.
        on_step: Called after each step with the result so far, which is not complete.

    Raises:
        ValueError: If an argument is out of range. ``num_eigenvalues`` must not exceed the dimension, and
            ``basis_memory`` has to hold k + 3 vectors.
        MemoryError: If there is no memory for k + 3 vectors.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.hessian import HessianOperator, lanczos
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> hessian = HessianOperator(model, lambda m, batch: m(batch).square().sum() / 2, [x])
        >>> result = lanczos(hessian, generator=torch.Generator().manual_seed(0), num_eigenvalues=2)
        >>> [round(value, 4) for value in result.eigenvalues]
        [9.0, 4.0]
    """
    dim = operator.shape[0]
    _check(dim, num_eigenvalues, tolerance, max_steps, start)
    most_vectors = check_basis_memory(basis_memory, dim, operator.dtype, operator.device, num_eigenvalues)
    iteration = KrylovIteration(operator, generator, num_eigenvalues, tolerance, most_vectors, start)

    def notify() -> None:
        if on_step is not None:
            on_step(iteration.result(is_complete=False))

    check = CompletenessCheck(operator, iteration, num_eigenvalues, tolerance, max_steps, notify)
    while True:
        iteration.step()
        notify()
        if iteration.is_whole:
            return iteration.result(is_complete=True)
        following = _following(iteration, num_eigenvalues, tolerance, check)
        if following is None and iteration.num_sequences == 1 and iteration.num_steps < min_steps:
            is_settled = has_settled is not None and has_settled(iteration.result(is_complete=False))
            following = None if is_settled else iteration.active
        if following is None:
            if iteration.make_room(NUM_OUTSIDE):
                check.forget()
                notify()
            found = check.run()
            if found in {"complete", "unknown"}:
                return iteration.result(is_complete=found == "complete")
            following = found if isinstance(found, int) else None
        if iteration.num_steps >= max_steps:
            return iteration.result(is_complete=False)
        with HeldInterrupts():
            is_restarted = iteration.begin() if following is None else iteration.proceed(following)
            if is_restarted:
                check.forget()
                notify()  # the result before does not fit the restarted basis


def check_basis_memory(
    basis_memory: int | None, dim: int, dtype: torch.dtype, device: torch.device, num_eigenvalues: int
) -> int:
    """Return the number of vectors that the basis may hold.

    Raises:
        ValueError: If ``basis_memory`` or the free memory is not enough for k + 3 vectors, but for fewer eigenvalues.
        MemoryError: If the free memory is not enough for a single eigenvalue.
    """
    each = dim * dtype.itemsize
    fewest = min(num_eigenvalues + MIN_EXTRA_VECTORS, dim)
    if basis_memory is not None:
        check_at_least(0, basis_memory=basis_memory)
        if basis_memory < fewest * each:
            raise ValueError(
                f"basis_memory: expected at least {fewest * each:,} bytes, {fewest} vectors of {dim:,} parameters for"
                f" num_eigenvalues = {num_eigenvalues}, got {basis_memory:,}. {_fitting(basis_memory // each)}Pass"
                " None, request fewer eigenvalues, or select a part of the parameters (params)."
            )
        return basis_memory // each
    budget = memory_budget(device, on_cpu=CPU_BASIS_MEMORY, share_of_gpu=1 / 4)
    free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is not None and fewest * each > free:
        largest = min(free // each - MIN_EXTRA_VECTORS, num_eigenvalues - 1)
        sizes = f"{fewest} vectors of {dim:,} numbers take {fewest * each:,} bytes, and {free:,} are free"
        if largest >= 1:
            raise ValueError(
                f"num_eigenvalues: expected at most {largest}, got {num_eigenvalues}: {sizes}. Pass"
                f" num_eigenvalues={largest}, analyze fewer parameters (params), or use another device."
            )
        raise MemoryError(
            f"there is no memory for one eigenvalue: {sizes}. Analyze fewer parameters (params), or use another device."
        )
    return max(budget // each, fewest)


def _fitting(vectors: int) -> str:
    """Return a sentence with the number of eigenvalues that a number of vectors is enough for, if there is one."""
    largest = vectors - MIN_EXTRA_VECTORS
    return f"This is enough for num_eigenvalues = {largest}. " if largest >= 1 else ""


def _following(iteration: KrylovIteration, k: int, tolerance: float, check: CompletenessCheck) -> int | None:
    """Return the index of the remainder to continue from; None if the k largest are accurate or there is none."""
    values, residuals, shares = iteration.ritz()
    if len(values) < k or check.is_still_missing(values):
        return iteration.active
    limits = (tolerance * values.abs()).clamp_min(iteration.rounding)
    inaccurate = (residuals > limits)[-k:].nonzero().flatten()
    if len(inaccurate):
        # the largest part of the residual of the largest of these
        return int(shares[:, len(values) - k + int(inaccurate[-1])].argmax())
    return None


def _check(dim: int, num_eigenvalues: int, tolerance: float, max_steps: int, start: Tensor | None) -> None:
    check_at_least(1, num_eigenvalues=num_eigenvalues, max_steps=max_steps)
    if num_eigenvalues > dim:
        raise ValueError(f"num_eigenvalues: expected 1 to {dim}, the number of parameters, got {num_eigenvalues}")
    check_positive(tolerance=tolerance)
    if max_steps < num_eigenvalues:
        raise ValueError(f"max_steps: expected at least num_eigenvalues = {num_eigenvalues}, got {max_steps}")
    if start is None:
        return
    is_vector = isinstance(start, Tensor) and start.shape == (dim,)
    if not is_vector or not bool(start.isfinite().all()) or not bool(start.any()):
        got = f"one of shape {tuple(start.shape)}" if isinstance(start, Tensor) else repr(start)
        raise ValueError(f"start: expected a finite vector of shape ({dim},) that is not zero, got {got}.")
