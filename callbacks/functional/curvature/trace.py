"""Trace of a symmetric operator: exact on a Krylov space, sampled on its complement (Hutchinson 1990, Meyer 2021)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.callbacks.functional.curvature.basis import dot, rademacher
from moe_heads.callbacks.functional.curvature.lanczos import LanczosResult
from moe_heads.callbacks.functional.curvature.operator import SymmetricOperator

__all__ = ["MIN_PROBES", "TraceResult", "deflated_trace"]

MIN_PROBES = 8
"""Probes before the standard error is trusted: at eight it is itself known to 25 %."""


@dataclass(frozen=True)
class TraceResult:
    r"""An estimate of :math:`\operatorname{tr} H` with its uncertainty.

    Attributes:
        estimate: The trace.
        stderr: Its standard error; 0 when the Krylov space is the whole space.
        frobenius_norm: Estimate of :math:`\|H\|_F`, from the same products.
        num_probes: Random vectors used, one product each.
        converged: Whether ``stderr`` met the tolerance.
    """

    estimate: float
    stderr: float
    frobenius_norm: float
    num_probes: int
    converged: bool


def deflated_trace(
    operator: SymmetricOperator,
    krylov: LanczosResult,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 100,
    on_step: Callable[[TraceResult], None] | None = None,
) -> TraceResult:
    r"""Trace by Hutchinson's estimator on the complement of a Krylov space that is already there.

    With Q the m Krylov vectors and :math:`\Pi = I - QQ^T`,

    .. math:: \operatorname{tr} H = \operatorname{tr} T + E[z^T \Pi H \Pi z],
        \qquad \|H\|_F^2 = \|T\|_F^2 + \beta_m^2 + E\|H \Pi z\|^2

    for Rademacher z, unbiased given Q. Q carries the large eigenvalues, so little variance is left. Probes are added
    until the standard error is at most ``tolerance`` times the larger of :math:`|\operatorname{tr} H|` and
    :math:`\|H\|_F` (a trace near zero, as at a random initialisation, has no meaningful relative error).

    Args:
        operator: The matrix H.
        krylov: Result of `lanczos` on the same operator.
        generator: Source of the probes, a CPU generator; not in the state from which ``krylov`` was started, or the
            first probe lies in the Krylov space.
        tolerance: Standard error wanted, as a fraction.
        max_probes: Most probes.
        on_step: Called after each probe with the result so far.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number; got {tolerance}")
    if max_probes < MIN_PROBES:
        raise ValueError(f"max_probes: expected at least {MIN_PROBES}; got {max_probes}")
    alphas, betas = krylov.alphas, krylov.betas
    known_trace = float(alphas.sum())
    known_squares = float(alphas.square().sum() + 2 * betas[:-1].square().sum() + betas[-1].square())
    if krylov.num_steps == operator.shape[0]:
        return TraceResult(known_trace, 0.0, known_squares**0.5, 0, True)
    forms: list[float] = []
    squares: list[float] = []
    while True:
        probe = krylov.basis.complement(rademacher(operator.shape[0], operator.dtype, operator.device, generator))
        product = operator.matvec(probe)
        forms.append(dot(probe, product))
        squares.append(dot(product, product))
        samples = torch.tensor(forms, dtype=torch.float64)
        estimate, stderr = known_trace + float(samples.mean()), _standard_error(samples)
        frobenius_norm = (known_squares + sum(squares) / len(squares)) ** 0.5
        # an overflow must not pass for a wide tolerance
        is_accurate = math.isfinite(frobenius_norm) and stderr <= tolerance * max(abs(estimate), frobenius_norm)
        converged = is_accurate and len(forms) >= MIN_PROBES
        result = TraceResult(estimate, stderr, frobenius_norm, len(forms), converged)
        if on_step is not None:
            on_step(result)
        if converged or len(forms) == max_probes:
            return result


def _standard_error(samples: Tensor) -> float:
    return float(samples.std() / len(samples) ** 0.5) if len(samples) > 1 else math.inf
