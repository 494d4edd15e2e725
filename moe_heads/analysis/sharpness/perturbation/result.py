"""What a perturbation sharpness analysis found, and how it is reported."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_heads.analysis._shared.tables import markdown_table

__all__ = ["Norm", "PerturbationSharpnessResult"]

Norm = Literal["l2", "linf"]
"""Norm of the ball of the worst case."""


@dataclass(frozen=True)
class PerturbationSharpnessResult:
    r"""Rise of a mean loss under perturbations :math:`\delta = c \odot u` of the weights, with its uncertainty.

    All values but the radii and the counts are in units of the loss.

    Attributes:
        average: :math:`E[L(w + \delta)] - L(w)` for u normal with standard deviation ``average_radius``.
        average_stderr: Its standard error over the draws.
        worst: Largest :math:`L(w + \delta) - L(w)` found with :math:`\|u\| \le` ``radius``: a lower bound of the
            maximum, attained by a perturbation that was measured; at least 0, which :math:`\delta = 0` attains.
        sam: The same after the one step of sharpness-aware minimization; negative where the step is too long.
        gradient_norm: Slope of the loss along the steepest u, :math:`\|c \odot \nabla L\|_2` for l2,
            :math:`\|c \odot \nabla L\|_1` for linf. ``radius`` times it is what a linear loss would rise by.
        center_loss: Loss of the model as it is.
        average_radius: Standard deviation of each entry of u in the average case.
        radius: Radius of the ball of the worst case, in ``norm``.
        norm: Norm of u in the worst case.
        adaptive: Whether :math:`c = |w|`; else c = 1.
        num_draws: Antithetic pairs in ``average``.
        num_evaluations: Evaluations of the loss over all samples, without a gradient.
        num_gradients: Evaluations of the loss and its gradient over all samples.
        num_nonfinite: Perturbed points whose loss is nan or inf. They are part of the values above: an average that is
            nan or inf, a worst case that is (its ascent ended there).
        num_samples: Samples of the loss.
        num_parameters: Parameters that were perturbed.
        num_fixed: Of these, the ones that are zero and so did not move; 0 unless adaptive.
        seed: Seed of the draws.
        partial: Why the analysis ended before its time; "" for one that is whole. What was not begun is nan, with an
            infinite standard error.
    """

    average: float
    average_stderr: float
    worst: float
    sam: float
    gradient_norm: float
    center_loss: float
    average_radius: float
    radius: float
    norm: Norm
    adaptive: bool
    num_draws: int
    num_evaluations: int
    num_gradients: int
    num_nonfinite: int
    num_samples: int
    num_parameters: int
    num_fixed: int
    seed: int
    partial: str = ""

    @property
    def average_curvature(self) -> float:
        r"""``2 · average / average_radius²``; tends to the trace of CHC, C = diag(c), as the radius tends to zero."""
        return 2 * self.average / self.average_radius**2

    @property
    def worst_curvature(self) -> float:
        r"""``2 · worst / radius²``; where the gradient vanishes, tends to a lower bound of the maximum of uᵀCHCu.

        The maximum is over unit u in ``norm``: for l2 it is the largest eigenvalue of CHC, comparable with
        `average_curvature` whatever the two radii are. Without a vanishing gradient it grows as 1 / radius.
        """
        return 2 * self.worst / self.radius**2

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log: average, average_stderr, worst, sam, curvatures, radii, counts."""
        values = {
            "average": self.average,
            "average_stderr": self.average_stderr,
            "worst": self.worst,
            "sam": self.sam,
            "average_curvature": self.average_curvature,
            "worst_curvature": self.worst_curvature,
            "gradient_norm": self.gradient_norm,
            "center_loss": self.center_loss,
            "average_radius": self.average_radius,
            "radius": self.radius,
            "num_draws": float(self.num_draws),
            "num_evaluations": float(self.num_evaluations),
            "num_gradients": float(self.num_gradients),
            "num_nonfinite": float(self.num_nonfinite),
            "num_samples": float(self.num_samples),
            **({"partial": 1.0} if self.partial else {}),
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def summary(self) -> str:
        """Markdown table of the numbers, and a sentence on what the reader has to know."""
        scale = r"\|w\|" if self.adaptive else "1"
        ball = f"{'‖u‖₂' if self.norm == 'l2' else '‖u‖∞'} ≤ {self.radius:g}"
        rows = [
            ("loss of the model", f"{self.center_loss:.5g}", ""),
            ("average case", f"{self.average:.5g} ± {self.average_stderr:.2g}", f"u ~ N(0, {self.average_radius:g}²)"),
            ("one SAM step", f"{self.sam:.5g}", ball),
            ("worst case found", f"{self.worst:.5g}", ball),
            ("steepest slope", f"{self.gradient_norm:.5g}", "per unit of u"),
            ("average curvature", f"{self.average_curvature:.5g}", "2 · average / radius²"),
            ("worst curvature", f"{self.worst_curvature:.5g}", "2 · worst / radius²"),
            ("evaluations", f"{self.num_evaluations} losses, {self.num_gradients} gradients", ""),
            ("samples", f"{self.num_samples}", ""),
            ("parameters", f"{self.num_parameters}", f"{self.num_fixed} fixed at zero" if self.adaptive else ""),
        ]
        table = markdown_table((f"rise of the loss at w + c ⊙ u, c = {scale}", "value", "where"), rows)
        return "\n\n".join([table, *self._shortfalls()])

    def _shortfalls(self) -> list[str]:
        shortfalls = [f"**Partial**: {self.partial}."] if self.partial else []
        if math.isnan(self.sam) and self.num_gradients < 2:
            shortfalls.append("The worst case was not begun.")
        if self.num_nonfinite:
            shortfalls.append(f"At {self.num_nonfinite} perturbed points the loss is nan or inf.")
        return shortfalls
