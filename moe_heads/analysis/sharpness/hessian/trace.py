"""Trace of a symmetric operator, exact on a Krylov space and sampled outside (Hutchinson 1990, Meyer 2021)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.basis import dot, uniform
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import SymmetricOperator
from moe_heads.checks import check_at_least, check_positive

__all__ = ["MIN_PROBES", "MIN_STRATA", "BlockTrace", "Places", "TraceResult", "deflated_trace", "sampling_stderr"]

MIN_PROBES = 8
"""Minimum number of rounds that can be asked for."""

Places = Mapping[str, Sequence[slice]]
"""Slices of the flat vector that belong to each block of parameters."""

MIN_STRATA = 4
"""Minimum number of parts of the data for an estimate of the spread over samples."""

# Degrees of freedom before the standard error is trusted. Then it is itself known to 18 %.
_TRUSTED_FREEDOM = 15

# The form of a block is a product of two numbers that hardly depend on each other, the vector there and its product
# with H. Its kurtosis is up to 9 instead of 3, so that a variance is known as well as from a quarter of the draws.
_TAILS_OF_A_BLOCK = 4

# Maximum number of bytes of random vectors at a time.
_PROBE_MEMORY = 2**28


@dataclass(frozen=True)
class BlockTrace:
    """Trace of the diagonal block of H that belongs to some parameters, with its standard error."""

    estimate: float
    stderr: float


@dataclass(frozen=True)
class TraceResult:
    r"""An estimate of :math:`\operatorname{tr} H` with its uncertainty.

    Attributes:
        estimate: The trace.
        stderr: Its standard error, widened for few samples so that twice the error covers 95 % (Student's t); 0 if the
            Krylov space is the whole space.
        frobenius_norm: Estimate of :math:`\|H\|_F`, from the same products.
        num_probes: Rounds of random vectors, each the cost of one product. With strata, the first round is for the
            Frobenius norm alone.
        converged: Whether ``stderr`` met the tolerance.
        blocks: Trace and standard error of each block of parameters.
        sampling_stderr: Standard error of the trace from the choice of samples, by the spread of the traces of the
            strata; nan with fewer than four, or where a restart lost their parts.
    """

    estimate: float
    stderr: float
    frobenius_norm: float
    num_probes: int
    converged: bool
    blocks: Mapping[str, BlockTrace]
    sampling_stderr: float = math.nan

    def meets(self, stderr: float, tolerance: float) -> bool:
        """Return whether a standard error is within the tolerance, relative to the larger of the trace and the norm."""
        # An overflow of the norm must not act as a wide tolerance.
        is_finite = math.isfinite(self.frobenius_norm)
        return is_finite and stderr <= tolerance * max(abs(self.estimate), self.frobenius_norm)


def deflated_trace(
    operator: SymmetricOperator,
    krylov: LanczosResult,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 100,
    blocks: Places | None = None,
    on_step: Callable[[TraceResult], None] | None = None,
) -> TraceResult:
    r"""Return the trace by Hutchinson's estimator on the complement of a given Krylov space.

    With Q the m Krylov vectors, :math:`\Pi = I - QQ^T`, and H the sum of :math:`H_s` over the strata of the data,

    .. math:: \operatorname{tr} H = \operatorname{tr} T + \sum_s E[z_s^T \Pi H_s \Pi z_s],
        \qquad \|H\|_F^2 = \|T\|_F^2 + \|r\|^2 + E\|H \Pi z\|^2

    for independent z with entries of mean 0 and variance 1 (`uniform`), unbiased given Q. Q carries the large
    eigenvalues, so little variance is left. A vector of its own for each stratum costs no more than one for all, and
    averages out what the strata share. The variance falls by up to their number. One round with the same vector for all
    gives the Frobenius norm. Of a block of parameters, with P the projection on them, the same vectors give
    :math:`\operatorname{tr} PHP = \operatorname{tr} Q^T P H Q + \sum_s E[z_s^T \Pi P H_s \Pi z_s]`.

    Rounds are added until the standard error is at most ``tolerance`` times the larger of
    :math:`|\operatorname{tr} H|` and :math:`\|H\|_F` (a trace near zero, as at a random initialization, has no
    meaningful relative error).

    Args:
        operator: The matrix H.
        krylov: Result of `lanczos` on the same operator.
        generator: Source of the probes, a CPU generator. Its state must differ from that at the start of ``krylov``,
            or the first probe lies in the Krylov space.
        tolerance: Requested standard error, as a fraction.
        max_probes: Maximum number of rounds.
        blocks: Places of blocks of parameters for which to compute the trace too.
        on_step: Called after each round with the result so far.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_positive(tolerance=tolerance)
    check_at_least(MIN_PROBES, max_probes=max_probes)
    sampling = _Sampling(operator, krylov, blocks or {}, generator)
    if krylov.is_whole:
        return sampling.result(tolerance)
    sampling.draw(stratified=False)
    while True:
        result = sampling.result(tolerance)
        if on_step is not None and result.num_probes:
            on_step(result)
        if result.converged or result.num_probes == max_probes:
            return result
        sampling.draw(stratified=operator.num_strata > 1)


class _Sampling:
    """Samples for each stratum and round: the forms of all parameters and of each block."""

    def __init__(
        self, operator: SymmetricOperator, krylov: LanczosResult, blocks: Places, generator: torch.Generator
    ) -> None:
        self._operator, self._krylov, self._blocks, self._generator = operator, krylov, blocks, generator
        known = [float(krylov.projected.trace()), *map(krylov.block_trace, blocks.values())]
        self._known = torch.tensor(known, dtype=torch.float64)
        self._rounds: list[Tensor] = []  # (strata, 1 + blocks) each
        self._squares: list[float] = []
        self._num_probes = 0

    def draw(self, stratified: bool) -> None:
        """Draw one more round, with a vector for each stratum or the same for all."""
        strata: Sequence[int | None] = range(self._operator.num_strata) if stratified else [None]
        dim, dtype, device = self._operator.shape[0], self._operator.dtype, self._operator.device
        at_once = max(1, _PROBE_MEMORY // (dim * torch.finfo(dtype).bits // 8))
        forms: list[Tensor] = []
        for start in range(0, len(strata), at_once):
            drawn = [uniform(dim, dtype, device, self._generator) for _ in strata[start : start + at_once]]
            probes = self._krylov.basis.complement(torch.stack(drawn))
            for stratum, probe in zip(strata[start:], probes, strict=False):
                product = self._operator.matvec(probe, stratum)
                forms.append(self._forms(probe, product))
                if stratum is None:
                    self._squares.append(dot(product, product))
        self._num_probes += 1
        if stratified or self._operator.num_strata == 1:
            self._rounds.append(torch.stack(forms))

    def result(self, tolerance: float) -> TraceResult:
        """Return the estimates from the samples so far."""
        squares = self._krylov.frobenius_square
        if self._squares:
            squares = squares + sum(self._squares) / len(self._squares)
        frobenius_norm = math.sqrt(float(squares))
        if self._num_probes == 0:
            estimates, stderrs, freedom = self._known, torch.zeros_like(self._known), math.inf
        else:
            estimates, stderrs, freedom = self._estimates()
        estimate, stderr = float(estimates[0]), float(stderrs[0])
        pairs = zip(self._blocks, estimates[1:].tolist(), stderrs[1:].tolist(), strict=True)
        found = TraceResult(
            estimate,
            stderr,
            frobenius_norm,
            self._num_probes,
            freedom >= _TRUSTED_FREEDOM,
            {name: BlockTrace(*found) for name, *found in pairs},
            self._sampling_stderr(),
        )
        return replace(found, converged=found.converged and found.meets(stderr, tolerance))

    def _sampling_stderr(self) -> float:
        """Return the spread of the traces of the strata, without the contribution of the probes."""
        forms = self._krylov.forms
        if forms is None or forms.shape[1] < MIN_STRATA or (self._num_probes and len(self._rounds) < 2):
            return math.nan
        traces, noise = forms.sum(0), 0.0
        if self._rounds:
            samples = torch.stack(self._rounds)[:, :, 0]  # (rounds, strata)
            traces = traces + samples.mean(0)
            noise = float(samples.var(0).sum()) / len(samples)
        return sampling_stderr(traces, self._operator.stratum_weights, noise)

    def _estimates(self) -> tuple[Tensor, Tensor, float]:
        """Return the estimates, their standard errors, and the degrees of freedom of the first."""
        num_rounds = len(self._rounds)
        if num_rounds == 0:
            unknown = torch.full_like(self._known, math.nan)
            return unknown, torch.full_like(self._known, math.inf), 0.0
        samples = torch.stack(self._rounds)  # (rounds, strata, 1 + blocks)
        estimates = self._known + samples.mean(0).sum(0)
        if num_rounds == 1:
            return estimates, torch.full_like(estimates, math.inf), 0.0
        variances = samples.var(0)
        total = variances.sum(0)
        # Welch and Satterthwaite: if one stratum outweighs the others, the result has its degrees of freedom.
        tiny = torch.finfo(torch.float64).tiny
        freedom = (num_rounds - 1) * total.square() / variances.square().sum(0).clamp_min(tiny)
        freedom = torch.where(total > 0, freedom, math.inf)
        # A block of zero rows (an expert without samples) has only rounding errors on the Krylov space.
        is_nothing = (total == 0) & (estimates.abs() <= self._krylov.rounding)
        estimates = torch.where(is_nothing, 0.0, estimates)
        effective = freedom.clone()
        effective[1:] /= _TAILS_OF_A_BLOCK
        return estimates, (total / num_rounds).sqrt() * _widening(effective), float(freedom[0])

    def _forms(self, probe: Tensor, product: Tensor) -> Tensor:
        values = probe * product
        places = [[slice(None)], *self._blocks.values()]
        # One number for each place, all fetched from the device at once.
        sums = [values[place].sum(dtype=torch.float64) for inside in places for place in inside]
        fetched = iter(torch.stack(sums).tolist())
        return torch.tensor([sum(next(fetched) for _ in inside) for inside in places], dtype=torch.float64)


def _widening(freedom: Tensor) -> Tensor:
    """Return the ratio of the 97.5 % quantiles of Student's t and the normal distribution, to 1 % from four degrees."""
    return 1 + 1.21 / freedom + 1.43 / freedom.square()


def sampling_stderr(parts: Tensor, weights: Tensor, noise: float = 0.0) -> float:
    """Return the standard error of a mean over samples from its parts by stratum.

    Args:
        parts: Contribution of each stratum to the mean, (S,).
        weights: Share of each stratum in the samples, (S,). The shares sum to 1.
        noise: Variance of the sum of the parts from other causes.

    Returns:
        The standard error, widened for the few strata as in `TraceResult`; nan for fewer than `MIN_STRATA`, and if the
        noise hides it: the difference of the two variances is then within the error of the first.
    """
    count = len(parts)
    if count < MIN_STRATA:
        return math.nan
    spread = float((parts - weights * parts.sum()).square().sum()) * count / (count - 1)
    # relative standard error of a variance from this many parts
    if noise > 0 and spread - noise <= spread * math.sqrt(2 / (count - 1)):
        return math.nan
    widening = float(_widening(torch.tensor(count - 1.0)))
    return math.sqrt(spread - noise) * widening
