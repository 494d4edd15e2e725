"""What a sharpness analysis has found so far, and the result that it makes of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_heads.analysis._shared.mean_check import CutDependence
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.certificate import Certificate
from moe_heads.analysis.sharpness.checks import from_krylov
from moe_heads.analysis.sharpness.first_value import first_value
from moe_heads.analysis.sharpness.hessian.basis import norm
from moe_heads.analysis.sharpness.hessian.density import spectral_density
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator, InterruptedProduct
from moe_heads.analysis.sharpness.hessian.trace import BlockTrace, Places, TraceResult, sampling_stderr
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = ["Findings"]

# Passes over the basis that a result takes: eigenvectors and the shares of the blocks in them.
_PASSES_OF_A_RESULT = 3

# Units in the last place, over the norm of H, that the arithmetic of the iteration itself may be off.
_ROUNDINGS = 8


@dataclass
class Findings:
    """What a run has found so far.

    Attributes:
        operator: The Hessian.
        places: Blocks of parameters.
        experts: Single experts.
        density: Whether the density is wanted.
        keep_eigenvectors: Whether these are wanted.
        seed: Seed of the run.
        trace_tolerance: Standard error of the trace at which it has converged.
        progress: Holds the result so far.
        dependence: Whether the loss is a mean over the samples.
        krylov: The Lanczos run.
        certificate: The checks.
        trace: The trace.
        sampling_stderr: Standard error of the largest eigenvalue from the choice of samples.
        true_residual: Residual norm of the first eigenpair, from a product of its own.
        largest: Largest eigenvalue and its residual by block.
        num_samples: Samples, where these are not all.
        center_loss: Mean loss over these.
    """

    operator: HessianOperator
    places: Places
    experts: Places
    density: bool
    keep_eigenvectors: bool
    seed: int
    trace_tolerance: float
    progress: Progress
    dependence: CutDependence
    krylov: LanczosResult | None = None
    certificate: Certificate | None = None
    trace: TraceResult | None = None
    sampling_stderr: float = math.nan
    true_residual: float = 0.0
    largest: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_samples: int | None = None
    center_loss: float | None = None

    def add_krylov(self, krylov: LanczosResult) -> None:
        """Take the state after a Lanczos step."""
        self.krylov = krylov
        self.progress.keep(self.result)
        self.progress.reserve(_PASSES_OF_A_RESULT * krylov.pass_seconds)
        self.progress.step(self.operator.num_products, residual=max(krylov.residuals))

    def add_first_value(self, interrupted: InterruptedProduct, tolerance: float) -> None:
        """Take what there is of the first product, on the first samples alone."""
        self.krylov = first_value(interrupted, tolerance)
        self.num_samples, self.center_loss = interrupted.num_samples, float(interrupted.sums[-1])
        self.progress.keep(self.result)

    def add_spread(self) -> None:
        """Multiply with the first eigenvector: its true residual, and the spread of its curvature over the samples."""
        assert self.krylov is not None
        first = self.krylov.basis.combined(self.krylov.coefficients[:1])[0]
        product = self.operator.matvec(first)
        self.sampling_stderr = sampling_stderr(self.operator.forms, self.operator.stratum_weights)
        self.true_residual = norm(product.sub_(first, alpha=self.krylov.eigenvalues[0]))
        self.progress.step(self.operator.num_products, residual=max(self.krylov.residuals))

    def add_trace(self, trace: TraceResult) -> None:
        """Take the trace after a round."""
        self.trace = trace
        self.progress.step(self.operator.num_products, trace=trace.estimate, stderr=trace.stderr)

    def add_block(self, name: str, largest: tuple[float, float]) -> None:
        """Take the largest eigenvalue of a block and its residual norm."""
        assert self.certificate is not None
        value, residual = largest
        error = residual + self._rounding(self.certificate)
        self.largest[name] = value, error / max(abs(value), torch.finfo(torch.float64).tiny)
        self.progress.step(self.operator.num_products, largest=largest[0])

    def result(self, partial: str = "") -> SharpnessResult:
        """The result so far."""
        krylov = self.krylov
        assert krylov is not None
        certificate = self.certificate or from_krylov(krylov, self.dependence, self.operator.center_loss)
        trace = self.trace or TraceResult(math.nan, math.inf, math.nan, 0, converged=False, blocks={})
        rounding = certificate.trace_rounding if math.isfinite(certificate.trace_rounding) else 0.0
        trace_stderr = math.hypot(trace.stderr, rounding)
        norms = self._residual_norms(krylov, certificate)
        vectors = krylov.vectors()
        tiny = torch.finfo(torch.float64).tiny
        residuals = [norm / max(abs(value), tiny) for norm, value in zip(norms, krylov.eigenvalues, strict=True)]
        return SharpnessResult(
            eigenvalues=krylov.eigenvalues,
            residuals=tuple(residuals),
            lambda_min=krylov.lambda_min,
            lambda_min_residual=krylov.lambda_min_residual
            + self._rounding(certificate) / max(abs(krylov.lambda_min), tiny),
            lambda_max_sampling_stderr=self.sampling_stderr,
            trace=trace.estimate,
            trace_stderr=trace_stderr,
            trace_sampling_stderr=trace.sampling_stderr,
            frobenius_norm=trace.frobenius_norm,
            density=spectral_density([krylov]) if self.density else None,
            blocks=self._curvatures(self.places, "block", trace, certificate, vectors),
            experts=self._curvatures(self.experts, "expert", trace, certificate, vectors),
            center_loss=self.operator.center_loss if self.center_loss is None else self.center_loss,
            num_steps=krylov.num_steps,
            num_probes=trace.num_probes,
            num_products=self.operator.num_products,
            num_samples=self.operator.num_samples if self.num_samples is None else self.num_samples,
            num_parameters=self.operator.num_parameters,
            eigenvalues_converged=certificate.is_hessian and krylov.have_converged(norms),
            trace_converged=certificate.is_hessian
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
        )

    def _residual_norms(self, krylov: LanczosResult, certificate: Certificate) -> list[float]:
        """Residual norms of the eigenvalues, with what the checks found."""
        count = len(krylov.eigenvalues)
        # an eigenvalue that close above the last one may be missing
        margin = 0.0 if krylov.is_whole else krylov.margin
        norms = krylov.residual_norms.flip(0)[:count].clamp_min(margin).tolist()
        if math.isfinite(certificate.rounding):
            # what rounding does was measured: its assumed size is not needed
            bare = krylov.bare_residual_norms.flip(0)[:count].clamp_min(max(krylov.asymmetry, margin))
            norms = (bare + self._rounding(certificate)).tolist()
        norms[0] = max(norms[0], self.true_residual)
        return norms

    def _rounding(self, certificate: Certificate) -> float:
        """What rounding adds to a residual, as far as it was measured."""
        measured = certificate.rounding if math.isfinite(certificate.rounding) else 0.0
        # inner products and basis vectors are rounded too
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
                shares=tuple(_shares(vectors, slices).clamp(0, 1).tolist()),
                trace=block.estimate,
                trace_stderr=math.hypot(block.stderr, certificate.block_rounding.get(key, 0.0)),
                lambda_max=self.largest.get(name, (None, None))[0],
                lambda_max_residual=self.largest.get(name, (None, None))[1],
            )
        return found


def _shares(vectors: Tensor, slices: Sequence[slice]) -> Tensor:
    """Squared norm of the unit vectors (k, P) on some places, (k,)."""
    total = torch.zeros(len(vectors), dtype=torch.float64)
    for place in slices:
        total += vectors[:, place].square().sum(1, dtype=torch.float64).cpu()
    return total
