"""What a sharpness analysis found, and how it is reported."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moe_heads.callbacks.functional.curvature.density import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SharpnessResult"]


@dataclass(frozen=True, eq=False)
class SharpnessResult:
    r"""Spectrum of the Hessian H of a mean loss, with its uncertainty.

    Attributes:
        eigenvalues: The algebraically largest eigenvalues, descending; units of the loss per squared parameter.
        residuals: :math:`\|Hv - \lambda v\| / |\lambda|` of each; a symmetric H has an eigenvalue within
            ``residual`` · :math:`|\lambda|` of the one given.
        lambda_min: Estimate of the smallest eigenvalue, from above.
        lambda_min_residual: Its relative residual; the analysis does not wait for it to become small.
        trace: Trace of H.
        trace_stderr: Its standard error.
        frobenius_norm: Estimate of :math:`\|H\|_F`, the root of the sum of squared eigenvalues.
        density: Density of all eigenvalues (``grid``, ``values``, ``sigma``, ...), or None when not asked for.
        blocks: By block of parameters, the share (0 to 1) of the squared norm of each eigenvector that lies in it.
        num_steps: Lanczos steps.
        num_probes: Random vectors for the trace.
        num_products: Hessian-vector products in all.
        num_samples: Samples of the loss.
        num_parameters: Order of H.
        eigenvalues_converged: Whether all of ``eigenvalues`` met their tolerance.
        trace_converged: Whether ``trace_stderr`` met its tolerance.
        graph_mode: "kept" or "rebuilt", how the products were computed.
        seed: Seed of the random vectors.
        parameter_names: The parameters in the order of the flat vectors, that of ``model.named_parameters()``.
        eigenvectors: Unit eigenvectors, shape (number of eigenvalues, num_parameters), on the CPU; None unless kept.
        partial: Why the analysis ended before its time; "" for one that is whole. There may be fewer eigenvalues than
            were asked for, and the trace is nan, with an infinite standard error, when it was not begun.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    lambda_min: float
    lambda_min_residual: float
    trace: float
    trace_stderr: float
    frobenius_norm: float
    density: SpectralDensity | None
    blocks: dict[str, tuple[float, ...]]
    num_steps: int
    num_probes: int
    num_products: int
    num_samples: int
    num_parameters: int
    eigenvalues_converged: bool
    trace_converged: bool
    graph_mode: Literal["kept", "rebuilt"]
    seed: int
    parameter_names: tuple[str, ...]
    eigenvectors: Tensor | None
    partial: str = ""

    @property
    def converged(self) -> bool:
        """Whether everything met its tolerance."""
        return self.eigenvalues_converged and self.trace_converged

    def metrics(self) -> dict[str, float]:
        """The numbers to log: lambda_max, lambda_2, ..., lambda_min, trace, trace_stderr, residual_max, counts."""
        first, *others = self.eigenvalues
        values = {
            "lambda_max": first,
            **{f"lambda_{rank}": value for rank, value in enumerate(others, start=2)},
            "lambda_min": self.lambda_min,
            "residual_max": max(self.residuals),
            "trace": self.trace,
            "trace_stderr": self.trace_stderr,
            "frobenius_norm": self.frobenius_norm,
            "num_products": float(self.num_products),
            "num_samples": float(self.num_samples),
            "converged": float(self.converged),
            **({"partial": 1.0} if self.partial else {}),
        }
        # of a partial result, what there is
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Density of the eigenvalues on a logarithmic axis, the largest ones marked.

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        from moe_heads.callbacks.functional.sharpness_figure import plot_spectrum

        return plot_spectrum(self.eigenvalues, self.density, ax)

    def summary(self) -> str:
        """Markdown table of the numbers, and a sentence for each that did not converge or is not there."""
        rows = [
            *(
                (f"λ{rank}", f"{value:.5g}", f"{residual:.1e}")
                for rank, (value, residual) in enumerate(zip(self.eigenvalues, self.residuals, strict=True), start=1)
            ),
            ("λmin", f"{self.lambda_min:.5g}", f"{self.lambda_min_residual:.1e}"),
            ("trace", f"{self.trace:.5g} ± {self.trace_stderr:.2g}", ""),
            ("Frobenius norm", f"{self.frobenius_norm:.5g}", ""),
            ("Hessian-vector products", f"{self.num_products} ({self.num_steps} Lanczos, {self.num_probes} trace)", ""),
            ("samples", f"{self.num_samples}", ""),
            ("parameters", f"{self.num_parameters}", ""),
        ]
        table = [
            "| quantity | value | relative residual |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        return "\n".join(table + [f"\n{sentence}" for sentence in self._shortfalls()])

    def _shortfalls(self) -> list[str]:
        shortfalls = [f"**Partial**: {self.partial}."] if self.partial else []
        if not self.eigenvalues_converged:
            shortfalls.append(
                f"The eigenvalues did not converge in {self.num_steps} steps: trust each only within its residual, "
                "or raise max_steps."
            )
        if math.isnan(self.trace):
            shortfalls.append("The trace was not begun.")
        elif not self.trace_converged:
            shortfalls.append(
                f"The trace did not reach its tolerance with {self.num_probes} probes: its standard error holds, "
                "or raise max_probes."
            )
        return shortfalls
