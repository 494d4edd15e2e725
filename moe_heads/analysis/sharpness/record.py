"""Intermediate values of a sharpness analysis, and the result made of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_heads.analysis._shared.mean_check import CutDependence
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.block import BlockCurvature, block_shares
from moe_heads.analysis.sharpness.certificate import Certificate
from moe_heads.analysis.sharpness.checks import from_krylov
from moe_heads.analysis.sharpness.first_value import first_value
from moe_heads.analysis.sharpness.hessian.basis import norm
from moe_heads.analysis.sharpness.hessian.both_ends import LowerEnd
from moe_heads.analysis.sharpness.hessian.density import spectral_density
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.trace import BlockTrace, Places, TraceResult, sampling_stderr
from moe_heads.analysis.sharpness.hessian.weighted_sum import InterruptedProduct, WeightedSum
from moe_heads.analysis.sharpness.pairs import Eigenpairs, eigenpairs
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = ["SharpnessRecord"]

# Passes over the basis to make a result: eigenvectors and their shares by block.
_PASSES_PER_RESULT = 3

# Error of the arithmetic of the iteration itself, in units in the last place of the norm of H.
_ROUNDINGS = 8


@dataclass
class SharpnessRecord:
    """The values of a sharpness analysis so far.

    Attributes:
        operator: The Hessian.
        places: Slices of the flat vector by block of parameters.
        experts: The same by expert.
        density: Whether the result includes the density.
        keep_eigenvectors: Whether the result includes the eigenvectors.
        seed: Seed of the analysis.
        trace_tolerance: Standard error of the trace at which it has converged.
        progress: Holds the result so far.
        dependence: Change of the loss when batches are halved.
        krylov: Result of the Lanczos iteration.
        lower: The lower end of the spectrum, for the eigenvalues of largest magnitude.
        certificate: Results of the checks.
        trace: The trace.
        sampling_stderr: Standard error of the largest eigenvalue from the choice of samples.
        true_residual: Residual norm of the first eigenpair, from one additional product.
        largest: Largest eigenvalue and its residual by block.
        num_samples: Number of samples of an incomplete first product; None otherwise.
        center_loss: Mean loss over these samples.
        has_trace: Whether the result includes the trace.
    """

    operator: WeightedSum
    places: Places
    experts: Places
    density: bool
    keep_eigenvectors: bool
    seed: int
    trace_tolerance: float
    progress: Progress
    dependence: CutDependence
    krylov: LanczosResult | None = None
    lower: LowerEnd | None = None
    certificate: Certificate | None = None
    trace: TraceResult | None = None
    sampling_stderr: float = math.nan
    true_residual: float = 0.0
    largest: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_samples: int | None = None
    center_loss: float | None = None
    has_trace: bool = True

    def add_krylov(self, krylov: LanczosResult) -> None:
        """Store the state after a Lanczos step."""
        self.krylov = krylov
        self.progress.keep(self.result)
        self.progress.reserve(_PASSES_PER_RESULT * krylov.pass_seconds)
        self.progress.step(self.operator.num_products, residual=max(krylov.residuals))

    def add_lower(self, lower: LowerEnd) -> None:
        """Store the state after a Lanczos step at the lower end."""
        self.lower = lower
        self.progress.keep(self.result)
        source = self.krylov if lower.krylov is None else lower.krylov
        assert source is not None
        self.progress.step(self.operator.num_products, residual=max(source.residuals))

    def from_krylov(self) -> Certificate:
        """Return the certificate with the checks that need no further product."""
        assert self.krylov is not None
        is_complete = self.krylov.is_complete if self.lower is None else self.lower.is_complete(self.krylov)
        return from_krylov(self.krylov, self.dependence, self.operator.center_loss, is_complete=is_complete)

    def add_first_value(self, interrupted: InterruptedProduct, tolerance: float) -> None:
        """Store the estimate from an interrupted first product, which covers the first samples only."""
        self.krylov = first_value(interrupted, tolerance)
        self.num_samples, self.center_loss = interrupted.num_samples, float(interrupted.sums[-1])
        self.progress.keep(self.result)

    def add_spread(self) -> None:
        """Compute the true residual of the first eigenvector and the spread of its curvature over the samples."""
        assert self.krylov is not None
        first = self.krylov.basis.combined(self.krylov.coefficients[:1])[0]
        product = self.operator.matvec(first)
        self.sampling_stderr = sampling_stderr(self.operator.forms, self.operator.stratum_weights)
        self.true_residual = norm(product.sub_(first, alpha=self.krylov.eigenvalues[0]))
        self.progress.step(self.operator.num_products, residual=max(self.krylov.residuals))

    def condense(self) -> LanczosResult:
        """Release all vectors but the eigenvectors, which the trace alone needs, and return the iteration with these.

        The memory is free for the checks then.
        """
        assert self.krylov is not None
        self.krylov = self.krylov.condensed()
        if isinstance(self.operator, HessianOperator):
            self.operator.pause()
        return self.krylov

    def add_trace(self, trace: TraceResult) -> None:
        """Store the trace after a round of probes."""
        self.trace = trace
        self.progress.step(self.operator.num_products, trace=trace.estimate, stderr=trace.stderr)

    def add_block(self, name: str, largest: tuple[float, float]) -> None:
        """Store the largest eigenvalue of a block and its residual norm."""
        assert self.certificate is not None
        value, residual = largest
        error = residual + self._rounding(self.certificate)
        self.largest[name] = value, error / max(abs(value), torch.finfo(torch.float64).tiny)
        self.progress.step(self.operator.num_products, largest=largest[0])

    def result(self, partial: str = "") -> SharpnessResult:
        """Return the result so far. ``partial`` is the reason if it is incomplete."""
        krylov = self.krylov
        assert krylov is not None
        certificate = self.certificate or self.from_krylov()
        trace = self.trace or TraceResult(math.nan, math.inf, math.nan, 0, converged=False, blocks={})
        trace_stderr = self._trace_error(trace.estimate, trace.stderr, certificate.trace_rounding, certificate)
        pairs = self._pairs(krylov, certificate)
        values, norms = pairs.values, pairs.norms
        tiny = torch.finfo(torch.float64).tiny
        residuals = [norm / max(abs(value), tiny) for norm, value in zip(norms, values, strict=True)]
        lambda_min, lambda_min_norm = krylov.lambda_min, krylov.lambda_min_residual * abs(krylov.lambda_min)
        lower = None if self.lower is None else self.lower.krylov
        if self.lower is not None and lower is not None and self.lower.eigenvalues[0] <= lambda_min:
            lambda_min, lambda_min_norm = self.lower.eigenvalues[0], float(lower.residual_norms[-1])
        vectors = pairs.vectors()
        return SharpnessResult(
            eigenvalues=values,
            residuals=tuple(residuals),
            which="largest" if self.lower is None else "magnitude",
            lambda_max=krylov.eigenvalues[0],
            lambda_min=lambda_min,
            lambda_min_residual=(lambda_min_norm + self._rounding(certificate)) / max(abs(lambda_min), tiny),
            lambda_max_sampling_stderr=self.sampling_stderr,
            trace=trace.estimate,
            trace_stderr=trace_stderr,
            trace_sampling_stderr=trace.sampling_stderr,
            frobenius_norm=trace.frobenius_norm,
            density=spectral_density([krylov]) if self.density else None,
            blocks=self._curvatures(self.places, "block", trace, certificate, vectors),
            experts=self._curvatures(self.experts, "expert", trace, certificate, vectors),
            center_loss=self.operator.center_loss if self.center_loss is None else self.center_loss,
            num_steps=krylov.num_steps + (0 if self.lower is None else self.lower.num_steps),
            num_probes=trace.num_probes,
            num_products=self.operator.num_products,
            num_samples=self.operator.num_samples if self.num_samples is None else self.num_samples,
            num_parameters=self.operator.num_parameters,
            eigenvalues_converged=certificate.is_hessian and certificate.is_in_range and pairs.have_converged,
            trace_converged=certificate.is_hessian
            and certificate.is_in_range
            and trace.converged
            and trace.meets(trace_stderr, self.trace_tolerance),
            graph_mode=self.operator.mode,
            graph_reason=self.operator.reason,
            seed=self.seed,
            parameter_names=self.operator.names,
            eigenvectors=vectors.cpu() if self.keep_eigenvectors else None,
            tolerance=krylov.tolerance,
            certificate=certificate,
            partial=partial,
            matrix=self.operator.matrix,
            has_trace=self.has_trace,
        )

    def _pairs(self, krylov: LanczosResult, certificate: Certificate) -> Eigenpairs:
        rounding = self._rounding(certificate)
        return eigenpairs(krylov, self.lower, certificate, rounding=rounding, true_residual=self.true_residual)

    def _trace_error(self, trace: float, stderr: float, rounding: float, certificate: Certificate) -> float:
        """Return the standard error of a trace with rounding and the errors of the derivatives."""
        relative = certificate.error_of_derivatives(trace) - certificate.product_error
        least = torch.finfo(self.operator.dtype).eps * certificate.scale
        return math.hypot(stderr, 0.0 if math.isnan(rounding) else rounding, relative, least)

    def _rounding(self, certificate: Certificate) -> float:
        """Return the contribution of rounding to a residual: the measured part and that of the iteration."""
        measured = certificate.rounding if math.isfinite(certificate.rounding) else 0.0
        # Inner products and basis vectors are rounded too.
        return measured + _ROUNDINGS * torch.finfo(self.operator.dtype).eps * certificate.scale

    def _curvatures(
        self, places: Places, kind: str, trace: TraceResult, certificate: Certificate, vectors: Tensor
    ) -> Mapping[str, BlockCurvature]:
        found = {}
        for name, slices in places.items():
            key = f"{kind} {name}"
            block = trace.blocks.get(key, BlockTrace(math.nan, math.inf))
            found[name] = BlockCurvature(
                num_parameters=sum(place.stop - place.start for place in slices),
                shares=block_shares(vectors, slices),
                trace=block.estimate,
                trace_stderr=self._trace_error(
                    block.estimate, block.stderr, certificate.block_rounding.get(key, 0.0), certificate
                ),
                lambda_max=self.largest.get(name, (None, None))[0],
                lambda_max_residual=self.largest.get(name, (None, None))[1],
            )
        return found
