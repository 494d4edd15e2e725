"""What a routing response analysis found, and how it is reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_heads.analysis._shared.tables import markdown_table

__all__ = ["RoutingResponse"]


@dataclass(frozen=True)
class RoutingResponse:
    r"""Loss and routing at :math:`\theta + s d`, with free routing and with that of s = 0 held fixed.

    Losses are in the unit of the loss, steps in that of the direction (its length, for a unit direction).

    Attributes:
        steps: s, those that were measured, in the order in which they were given.
        losses_free: Mean loss over the samples at each step, the routers choosing as they do there; nan and inf as the
            model gave them.
        losses_fixed: Mean loss at each step with the choices of s = 0; None when no sparse router ran.
        flips: Share of the samples (0 to 1) whose set of chosen experts is not that of s = 0, at each step; the mean
            over the sparse routers' passes. None when no sparse router ran.
        center_loss: Loss of the model as it is.
        num_samples: Samples of the loss.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Steps that the analysis did not come to. Zero unless it is partial.
        partial: Why the analysis ended before its time; "" for one that is whole.
    """

    steps: tuple[float, ...]
    losses_free: tuple[float, ...]
    losses_fixed: tuple[float, ...] | None
    flips: tuple[float, ...] | None
    center_loss: float
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""

    def curvature_free(self, step: float) -> float | None:
        r"""Second difference :math:`(L(s) + L(-s) - 2 L(0)) / s^2` of the loss with free routing.

        Where routing flips, the jumps of the loss are in it, which grow as 1 / s² when s shrinks.

        Args:
            step: s, of either sign, not zero.

        Returns:
            The second difference; nan or inf where a loss is. None unless both s and -s were measured.
        """
        return self._curvature(self.losses_free, step)

    def curvature_fixed(self, step: float) -> float | None:
        """The same with the routing held fixed: tends to the quadratic form of the Hessian, d·Hd, as s tends to zero.

        None as well when no sparse router ran; the curvature is then that of `curvature_free`.
        """
        return None if self.losses_fixed is None else self._curvature(self.losses_fixed, step)

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log: center_loss, num_samples, and for each step s flips_s, loss_free_s, loss_fixed_s.

        Besides curvature_free_s and curvature_fixed_s for each s > 0 that was measured with both signs.
        """
        values: dict[str, float | None] = {"center_loss": self.center_loss}
        by_step = {"flips": self.flips, "loss_free": self.losses_free, "loss_fixed": self.losses_fixed}
        for name, found in by_step.items():
            if found is not None:
                values |= {f"{name}_{step:g}": value for step, value in zip(self.steps, found, strict=True)}
        for step in self._two_sided:
            values[f"curvature_free_{step:g}"] = self.curvature_free(step)
            values[f"curvature_fixed_{step:g}"] = self.curvature_fixed(step)
        values["num_samples"] = float(self.num_samples)
        if self.partial:
            values["partial"] = 1.0
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def summary(self) -> str:
        """Markdown tables of losses and second differences by step, and a sentence on what the reader has to know."""
        sparse = self.losses_fixed is not None and self.flips is not None
        header = ["step s", "loss", "rise"]
        rows = [
            [f"{s:g}", f"{loss:.6g}", self._rise(loss)] for s, loss in zip(self.steps, self.losses_free, strict=True)
        ]
        if self.losses_fixed is not None and self.flips is not None:
            header = [*header, "loss, routing of s = 0", "rise, routing of s = 0", "samples that flip"]
            for row, loss, flips in zip(rows, self.losses_fixed, self.flips, strict=True):
                row += [f"{loss:.6g}", self._rise(loss), f"{flips:.2%}"]
        order = sorted(range(len(rows)), key=lambda index: self.steps[index])
        table = markdown_table(header, [rows[index] for index in order])
        return "\n".join([table, *self._curvature_table(sparse), *(f"\n{note}" for note in self._notes())])

    def _rise(self, loss: float) -> str:
        return f"{loss - self.center_loss:+.3g}"

    def _curvature_table(self, sparse: bool) -> list[str]:
        if not self._two_sided:
            return []
        header = ["step s", "(L(s) + L(-s) - 2 L(0)) / s²", *(["the same, routing of s = 0"] if sparse else [])]
        found = [(s, self.curvature_free(s), self.curvature_fixed(s)) for s in self._two_sided]
        rows = [[f"{s:g}", *(f"{value:.5g}" for value in values if value is not None)] for s, *values in found]
        return ["", markdown_table(header, rows)]

    def _notes(self) -> list[str]:
        notes = [f"{self.num_samples} samples; loss of the model as it is {self.center_loss:.6g}."]
        if self.partial:
            notes.append(f"**Partial**: {self.partial}; {self.num_unmeasured} steps are missing.")
        if self.flips is None:
            notes.append("No sparse router ran: there is no choice that could change.")
        elif any(self.flips):
            notes.append("Where samples flip, the loss jumps; the Hessian is that of the loss with the routing fixed.")
        if not all(map(math.isfinite, (*self.losses_free, *(self.losses_fixed or ())))):
            notes.append("Some losses are nan or inf.")
        return notes

    @property
    def _two_sided(self) -> list[float]:
        """Positive steps that were measured with both signs, ascending."""
        return sorted(step for step in self.steps if step > 0 and self.curvature_free(step) is not None)

    def _curvature(self, losses: Sequence[float], step: float) -> float | None:
        ends = [loss for sign in (1, -1) if (loss := self._at(losses, sign * step)) is not None]
        return (ends[0] + ends[1] - 2 * self.center_loss) / step**2 if step and len(ends) == 2 else None

    def _at(self, losses: Sequence[float], step: float) -> float | None:
        # 1e-12: a grid's two ends may differ by a rounding error
        return next((y for x, y in zip(self.steps, losses, strict=True) if math.isclose(x, step, rel_tol=1e-12)), None)
