"""Result of a sharpness analysis and its report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.routing_response import RoutingResponse
from moe_heads.analysis.sharpness.block import BlockCurvature, blocks_table
from moe_heads.analysis.sharpness.certificate import Certificate
from moe_heads.analysis.sharpness.hessian.both_ends import Which
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity
from moe_heads.analysis.sharpness.hessian.products import GraphMode, Matrix
from moe_heads.analysis.sharpness.perturbation import PerturbationSharpnessResult
from moe_heads.analysis.sharpness.preconditioned import PreconditionedSharpnessResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Engine", "SharpnessResult"]

Engine = Literal["lanczos", "pyhessian"]
"""Implementation: that of this package, or PyHessian as in arXiv 2601.15021."""

# Relative residual of the smallest eigenvalue above which even its sign may be wrong.
_LOOSE = 0.1


@dataclass(frozen=True, eq=False)
class SharpnessResult:
    r"""Spectrum of the Hessian H of a mean loss, or of its Gauss-Newton matrix, with its uncertainty.

    Attributes:
        eigenvalues: The algebraically largest eigenvalues, descending, or those of largest magnitude in descending
            order of it, in units of the loss per squared parameter. With
            PyHessian they are in its order.
        residuals: :math:`\|Hv - \lambda v\| / |\lambda|` of each, including rounding and asymmetry of the products. A
            symmetric H has an eigenvalue within ``residual`` · :math:`|\lambda|` of the given one.
        lambda_min: Estimate of the smallest eigenvalue, from above; nan with PyHessian. It is a metric only where its
            relative residual is at most 10 %.
        lambda_min_residual: Its relative residual, which has no tolerance.
        trace: Trace of H.
        trace_stderr: Its standard error, from the random probes and from rounding.
        frobenius_norm: Estimate of :math:`\|H\|_F`, the root of the sum of squared eigenvalues; nan with PyHessian.
        density: Density of all eigenvalues (``grid``, ``values``, ``stderr``, ``sigma``, ...), or None.
        blocks: Curvature by block of parameters.
        experts: Curvature by single expert, "expert 0" and so on, of heads with stacked experts.
        num_steps: Lanczos steps; power iterations with PyHessian.
        num_probes: Random vectors for the trace, in units of one product.
        num_products: Hessian-vector products in total.
        num_samples: Samples of the loss.
        num_parameters: Order of H.
        eigenvalues_converged: Whether all of ``eigenvalues`` met their tolerance, none is missing, and no check of
            ``certificate`` failed.
        trace_converged: Whether ``trace_stderr`` met its tolerance, and no check failed.
        graph_mode: Whether the graph of the gradient was "kept" between products or "rebuilt" in each.
        graph_reason: Why a faster way was not used; "" if none exists.
        seed: Seed of the random vectors.
        parameter_names: The parameters in the order of the flat vectors, that of ``model.named_parameters()``.
        eigenvectors: Unit eigenvectors, shape (number of eigenvalues, num_parameters), on the CPU; None unless kept.
        partial: Why the analysis ended early; "" for a complete result. A partial result may have fewer eigenvalues
            than requested. A trace that was not started is nan, with an infinite standard error.
        tolerance: Requested bound of the relative residuals.
        certificate: Checks on this model and these samples; None with PyHessian.
        center_loss: Mean loss over the samples; nan with PyHessian.
        lambda_max_sampling_stderr: Standard error of the largest eigenvalue from the choice of samples, by the spread
            of its parts over batches (a jackknife to first order); nan with fewer than four batches. ``residuals`` do
            not include it. It does not include the bias of few samples, whose largest eigenvalue lies above that of
            many.
        trace_sampling_stderr: The same for the trace; nan where a restart lost its parts, or the random probes hide it.
        engine: Implementation of the analysis.
        failures: A sentence for each failure of PyHessian.
        overlaps: By name of another result, the overlap of its top eigenvectors with these, 0 for
            orthogonal and 1 for equal spaces.
        perturbation: Adaptive and SAM sharpness, if the callback has the option.
        routing: Changes of the routing of a sparse head along the first eigenvector, if the callback has the option.
        stability_threshold: :math:`\lambda_{\max}` above which the optimizer's steps are unstable on a quadratic; None
            where it is unknown.
        history: The largest eigenvalue and the stability threshold by tracked epoch.
        preconditioned: Largest eigenvalues in the metric of an adaptive optimizer, if they were requested.
        matrix: "hessian" or "gauss_newton", which H then stands for.
        which: "largest" or "magnitude": the selected eigenvalues.
        lambda_max: The algebraically largest eigenvalue.
        has_trace: Whether the trace was requested. If not, it is nan, as are the traces of the blocks.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    lambda_min: float
    lambda_min_residual: float
    trace: float
    trace_stderr: float
    frobenius_norm: float
    density: SpectralDensity | None
    blocks: Mapping[str, BlockCurvature]
    experts: Mapping[str, BlockCurvature]
    num_steps: int
    num_probes: int
    num_products: int
    num_samples: int
    num_parameters: int
    eigenvalues_converged: bool
    trace_converged: bool
    graph_mode: GraphMode
    seed: int
    parameter_names: tuple[str, ...]
    eigenvectors: Tensor | None
    graph_reason: str = ""
    tolerance: float = 1e-3
    certificate: Certificate | None = None
    center_loss: float = math.nan
    lambda_max_sampling_stderr: float = math.nan
    trace_sampling_stderr: float = math.nan
    partial: str = ""
    engine: Engine = "lanczos"
    failures: tuple[str, ...] = ()
    overlaps: Mapping[str, float] = field(default_factory=dict)
    perturbation: PerturbationSharpnessResult | None = None
    routing: RoutingResponse | None = None
    stability_threshold: float | None = None
    history: Mapping[int, tuple[float, float | None]] = field(default_factory=dict)
    preconditioned: PreconditionedSharpnessResult | None = None
    matrix: Matrix = "hessian"
    which: Which = "largest"
    lambda_max: float = math.nan
    has_trace: bool = True

    @property
    def is_negative_dominant(self) -> bool:
        """True if the smallest eigenvalue is larger in magnitude than the largest one. False without a smallest one."""
        # the estimate of the smallest eigenvalue is an upper bound of it
        return self.lambda_min < -max(*self.eigenvalues, self.lambda_max if self.which == "magnitude" else -math.inf)

    @property
    def converged(self) -> bool:
        """True if the eigenvalues, and the trace if it was requested, met their tolerances."""
        return self.eigenvalues_converged and (self.trace_converged or not self.has_trace)

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers to log: lambda_max, lambda_2, ..., trace, trace_stderr, residual_max, counts."""
        values = {
            **self._eigenvalues_by_key(),
            **({"lambda_min": self.lambda_min} if self.lambda_min_residual <= _LOOSE else {}),
            "residual_max": max(self.residuals),
            "trace": self.trace,
            "trace_stderr": self.trace_stderr,
            "frobenius_norm": self.frobenius_norm,
            "center_loss": self.center_loss,
            "lambda_max_sampling_stderr": self.lambda_max_sampling_stderr,
            "trace_sampling_stderr": self.trace_sampling_stderr,
            **({} if self.certificate is None else self.certificate.metrics()),
            **{f"trace_{_key(name)}": block.trace for name, block in self.blocks.items()},
            **{f"trace_stderr_{_key(name)}": block.trace_stderr for name, block in self.blocks.items()},
            **{f"share_{_key(name)}": block.shares[0] for name, block in self.blocks.items() if block.shares},
            **{
                f"lambda_max_{_key(name)}": block.lambda_max
                for name, block in self.blocks.items()
                if block.lambda_max is not None
            },
            **{f"overlap_{name}": overlap for name, overlap in self.overlaps.items()},
            **({} if self.perturbation is None else _of_part("perturbation", self.perturbation.metrics())),
            **({} if self.routing is None else _of_part("routing", self.routing.metrics())),
            **({} if self.stability_threshold is None else {"stability_threshold": self.stability_threshold}),
            **({} if self.preconditioned is None else _of_part("preconditioned", self.preconditioned.metrics())),
            "num_products": float(self.num_products),
            "num_samples": float(self.num_samples),
            "converged": float(self.converged),
            "eigenvalues_converged": float(self.eigenvalues_converged),
            **({"trace_converged": float(self.trace_converged)} if self.has_trace else {}),
            **({"partial": 1.0} if self.partial else {}),
        }
        # A partial result has only some of them.
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _eigenvalues_by_key(self) -> dict[str, float]:
        first, *others = self.eigenvalues
        if self.which == "magnitude":
            ranked = {f"lambda_magnitude_{rank}": value for rank, value in enumerate(self.eigenvalues, start=1)}
            return {"lambda_max": self.lambda_max, **ranked}
        return {"lambda_max": first, **{f"lambda_{rank}": value for rank, value in enumerate(others, start=2)}}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Plot the density of the eigenvalues on a logarithmic axis and mark the largest ones.

        Args:
            ax: Axes to draw into; by default those of a new figure outside pyplot.
        """
        from moe_heads.analysis.sharpness.figures import plot_spectrum

        return plot_spectrum(self.eigenvalues, self.density, ax, matrix=self._matrix_name, which=self.which)

    def plot_blocks(self) -> "Figure | None":
        """Plot the shares of the eigenvectors by block, and the traces with their standard errors if they are known.

        Returns:
            The figure; None for fewer than two blocks.
        """
        from moe_heads.analysis.sharpness.figures import plot_blocks

        return plot_blocks(self.blocks, self.experts) if len(self.blocks) > 1 else None

    def plot_history(self) -> "Figure | None":
        """Plot the largest eigenvalue and the stability threshold over the epochs; None where it was not tracked."""
        from moe_heads.analysis.sharpness.figures import plot_history

        return plot_history(self.history) if self.history else None

    def summary(self) -> str:
        """Return Markdown tables of the numbers, with a sentence for each that is missing or did not converge."""
        parts = [
            markdown_table(("quantity", "value", "relative residual"), self._rows()),
            ""
            if self.certificate is None
            else markdown_table(("checked on this input", "error"), self.certificate.rows()),
            blocks_table("block", self.blocks),
            blocks_table("expert", self.experts),
            "" if self.perturbation is None else f"**Perturbations**\n\n{self.perturbation.summary()}",
            "" if self.preconditioned is None else f"**Optimizer's metric**\n\n{self.preconditioned.summary()}",
            "" if self.routing is None else f"**Along the first eigenvector**\n\n{self.routing.summary()}",
            *self._limitations(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _rows(self) -> list[tuple[str, ...]]:
        suffix = "" if self.which == "largest" else " by magnitude"
        rows: list[tuple[str, ...]] = [] if self.matrix == "hessian" else [("matrix", self._matrix_name, "")]
        rows += [
            (f"λ{rank}{suffix}", f"{value:.5g}", f"{residual:.1e}")
            for rank, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1)
        ]
        if self.which == "magnitude":
            rows.append(("λmax", f"{self.lambda_max:.5g}", ""))
        if math.isfinite(self.lambda_min):
            bound = "" if self.lambda_min_residual <= _LOOSE else "at most "
            rows.append(("λmin", f"{bound}{self.lambda_min:.5g}", f"{self.lambda_min_residual:.1e}"))
        if self.stability_threshold is not None:
            rows.append(("stability threshold", f"{self.stability_threshold:.5g}", ""))
        trace = f"{self.trace:.5g} ± {self.trace_stderr:.2g}" if self.has_trace else "not computed"
        rows.append(("trace", trace, ""))
        sampling = (("λ1", self.lambda_max_sampling_stderr), ("trace", self.trace_sampling_stderr))
        rows += [(f"{name}, over samples", f"± {error:.2g}", "") for name, error in sampling if math.isfinite(error)]
        if math.isfinite(self.frobenius_norm):
            rows.append(("Frobenius norm", f"{self.frobenius_norm:.5g}", ""))
        rows += [(f"overlap with {name}", f"{overlap:.3f}", "") for name, overlap in self.overlaps.items()]
        steps = "Lanczos" if self.engine == "lanczos" else "power iteration"
        rest = self.num_products - self.num_steps - self.num_probes
        spent = f"{self.num_products} ({self.num_steps} {steps}"
        spent += f", {self.num_probes} trace" if self.has_trace else ""
        spent += f", {rest} others)" if rest > 0 and self.engine == "lanczos" else ")"
        return [
            *rows,
            (f"{'Hessian' if self.matrix == 'hessian' else 'matrix'}-vector products", spent, ""),
            (
                "graph of the products",
                self.graph_mode + (f" ({_table_cell(self.graph_reason)})" if self.graph_reason else ""),
                "",
            ),
            ("samples", f"{self.num_samples}", ""),
            ("parameters", f"{self.num_parameters}", ""),
        ]

    @property
    def _matrix_name(self) -> str:
        return "Hessian" if self.matrix == "hessian" else "Gauss-Newton matrix"

    def _limitations(self) -> list[str]:
        limitations = [f"**Partial**: {self.partial}, with {self.num_samples} samples."] if self.partial else []
        limitations += self._negative_curvature()
        limitations += [f"**PyHessian**: {failure}" for failure in self.failures]
        limitations += [] if self.certificate is None else self.certificate.warnings()
        limitations += self.unconverged_eigenvalues()
        if not self.has_trace:
            return limitations
        if math.isnan(self.trace):
            limitations.append("The trace was not computed.")
        elif not self.trace_converged:
            limitations.append(
                f"The trace did not reach its tolerance with {self.num_probes} probes. Its standard error is valid."
                + (" Raise max_probes for a smaller one." if self.engine == "lanczos" else "")
            )
        return limitations

    def _negative_curvature(self) -> list[str]:
        if not self.is_negative_dominant:
            return []
        largest = self.lambda_max if self.which == "magnitude" else max(self.eigenvalues)
        more = "" if self.which == "magnitude" else ' Pass which="magnitude" for the eigenvalues of largest magnitude.'
        return [
            f"**Negative curvature**: λmin = {self.lambda_min:.5g} is larger in magnitude than λmax = {largest:.5g}, so"
            f" the loss bends most along a direction of negative curvature.{more}"
        ]

    def unconverged_eigenvalues(self) -> list[str]:
        """Return a sentence with the reason and the remedy if the eigenvalues did not converge, else nothing."""
        return [] if self.eigenvalues_converged else [self._why_not_converged()]

    def _why_not_converged(self) -> str:
        if self.engine != "lanczos" or self.certificate is None:
            return f"The eigenvalues did not converge in {self.num_steps} steps. Each is accurate only to its residual."
        largest = max(map(abs, self.eigenvalues))
        if not self.certificate.is_in_range:
            return (
                f"The eigenvalues are not certified, because squares of numbers of size {largest:.1g} leave the range"
                f" of {self.certificate.dtype}. Multiply the loss by a number."
            )
        if self.certificate.error_of_derivatives(largest) > self.tolerance * largest:
            return (
                "The eigenvalues did not converge, because the derivatives differ from finite differences, the gradient"
                f" by {self.certificate.derivative_error:.1g} and a product by {self.certificate.curvature_error:.1g}"
                " of its size. Each eigenvalue is accurate only to its residual, which includes this error. Look for"
                " a custom backward or a detach() in the loss."
            )
        rounding, lost = self.certificate.rounding, []
        for rank, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1):
            if residual > self.tolerance and self.certificate.is_complete:
                # the iteration reached its end, so what is left of the residual is rounding
                rounding = max(residual * abs(value), 0.0 if math.isnan(rounding) else rounding)
                lost.append(rank)
            elif rounding > self.tolerance * abs(value):
                lost.append(rank)
        if lost:
            dtype = self.certificate.dtype
            wider = "Raise the tolerance"
            if dtype != "float64":
                wider = "Analyze a copy in float64 (model.double(), with batches in float64)"
            return (
                f"{', '.join(f'λ{rank}' for rank in lost)} did not converge: {dtype} does not resolve eigenvalues of"
                f" this size, because rounding changes them by about {rounding:.1g}. {wider}, or request fewer"
                " eigenvalues."
            )
        if max(self.residuals) <= self.tolerance and not self.certificate.is_complete:
            return (
                f"The residuals met the tolerance, but {self.num_steps} steps could not exclude a missing larger"
                " eigenvalue, such as a copy of a repeated one. Raise max_steps or basis_memory."
            )
        return (
            f"The eigenvalues did not converge in {self.num_steps} steps. Each is accurate only to its residual. Raise"
            " max_steps for more."
        )


def _of_part(part: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a part, without those that the whole result has too."""
    return {f"{part}_{name}": value for name, value in metrics.items() if name not in {"num_samples", "partial"}}


def _key(name: str) -> str:
    return name.replace(" ", "_").replace(".", "_")


def _table_cell(text: str) -> str:
    """Return the first line of a message, without the character that ends a cell of a Markdown table."""
    return text.splitlines()[0].replace("|", "/")
