"""Result of the critical sharpness of one update."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis._shared.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CriticalSharpnessResult"]


@dataclass(frozen=True)
class CriticalSharpnessResult:
    r"""Critical sharpness :math:`\lambda_c = 2 / (t_c \eta)` of one update :math:`\Delta`.

    Attributes:
        lambda_c: The critical sharpness, in units of one over the learning rate; NaN if ``reason`` says why.
        relative_error: Largest relative error of ``lambda_c`` from the width of the bracket, and from the rounding of
            the losses at its two ends; infinity if ``lambda_c`` is NaN.
        lower: Lower bound of ``lambda_c`` from the evaluated losses.
        upper: Upper bound, infinity if there is none.
        critical_step: :math:`t_c`, the smallest multiple of the update at which the loss rises; NaN likewise. Below 1,
            the update itself raises the loss.
        learning_rate: :math:`\eta`; 1.0 for units of the update itself.
        loss: Loss before the update.
        steps: Evaluated multiples of the update, ascending, without 0.
        losses: Loss at each of them.
        num_passes: Number of evaluations of the loss, that at 0 included.
        num_samples: Number of samples in an evaluation.
        tolerance: Relative width at which the search ends.
        reason: Reason why ``lambda_c`` is NaN; else "".
    """

    lambda_c: float
    relative_error: float
    lower: float
    upper: float
    critical_step: float
    learning_rate: float
    loss: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    num_passes: int
    num_samples: int
    tolerance: float
    reason: str = ""

    @property
    def converged(self) -> bool:
        """True if the relative error, with that of rounding, is within the tolerance."""
        return self.relative_error <= self.tolerance

    @property
    def threshold(self) -> float:
        r""":math:`2 / \eta`, the critical sharpness at which the update leaves the loss as it is."""
        return 2 / self.learning_rate

    def metrics(self) -> dict[str, float]:
        """Return the numbers for loggers, without those that are unknown."""
        numbers = {
            "lambda_c": self.lambda_c,
            "relative_error": self.relative_error,
            "critical_step": self.critical_step,
            "threshold": self.threshold,
            "loss": self.loss,
            "num_passes": float(self.num_passes),
        }
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def summary(self) -> str:
        """Return the numbers as a table in Markdown."""
        value = f"{self.lambda_c:.4g} ± {100 * self.relative_error:.2g} %" if not self.reason else "unknown"
        rows = [
            ("critical sharpness λc", value),
            ("bounds of λc", f"{self.lower:.4g} to {self.upper:.4g}"),
            ("threshold 2/η", f"{self.threshold:.4g}"),
            ("multiple of the update at which the loss rises", f"{self.critical_step:.4g}"),
            ("loss before the update", f"{self.loss:.6g}"),
            ("forward passes", f"{self.num_passes} over {self.num_samples} samples"),
        ]
        table = markdown_table(("quantity", "value"), rows)
        return f"{table}\n\nλc is unknown: {self.reason}." if self.reason else table

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Plot the evaluated losses along the update.

        Args:
            ax: Axes to draw on; by default a new figure.
        """
        figure, ax = axes_of(ax)
        shown = [(t, loss) for t, loss in zip((0.0, *self.steps), (self.loss, *self.losses), strict=True)]
        shown = [(t, loss) for t, loss in shown if math.isfinite(loss)]
        ax.plot([t for t, _ in shown], [loss for _, loss in shown], marker=".", label="loss")
        ax.axhline(self.loss, linestyle=":", color="gray", label="loss before the update")
        ax.axvline(1.0, linestyle="--", color="tab:red", label="the update")
        if math.isfinite(self.critical_step):
            ax.axvline(self.critical_step, color="tab:green", label="first rise")
        ax.set_xlabel("multiple of the update")
        ax.set_ylabel("loss")
        ax.set_title("critical sharpness unknown" if self.reason else f"critical sharpness {self.lambda_c:.4g}")
        ax.legend()
        return figure, ax
