"""What a sweep over random directions found, and how it is reported."""

import math
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.figures import CARD, legend_above
from moe_heads.analysis.loss_landscape.validity import crossing_radius, second_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DirectionSweepResult"]

# Outer quantiles of the band: most of the directions, whatever their number.
_LOW, _HIGH = 0.1, 0.9


@dataclass(frozen=True, eq=False)
class DirectionSweepResult:
    """Mean loss along several random directions; all tensors float64 on the CPU. K directions, A coordinates.

    Attributes:
        alphas: Coordinates, (A,).
        losses: Mean loss over the samples, (K, A); nan and inf as the model gave them.
        losses_fixed_routing: The same with the choices of the center held; None without a sparse head.
        routing_flips: Share of the samples whose set of experts is not that at the center, (K, A); None without router.
        center_loss: Loss of the model as it is.
        num_samples: Samples of the loss.
        seed: Seed of the directions.
        num_unmeasured: Directions that the analysis did not come to. Zero unless it is partial.
        partial: Why the analysis ended before its time; "" for one that is whole.
    """

    alphas: Tensor
    losses: Tensor
    losses_fixed_routing: Tensor | None
    routing_flips: Tensor | None
    center_loss: float
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""

    @property
    def num_nonfinite(self) -> int:
        """Points whose loss is nan or inf; where there is one, mean and band of its step are not finite either."""
        return int((~self.losses.isfinite()).sum())

    @property
    def mean(self) -> Tensor:
        """Mean over the directions, (A,)."""
        return self.losses.mean(0)

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, (A,); nan for one direction."""
        return self.losses.std(0) / math.sqrt(len(self.losses))

    def quantile(self, share: float) -> Tensor:
        """Loss that this share of the directions stays below, (A,)."""
        return self.losses.quantile(share, dim=0)

    @property
    def curvatures(self) -> tuple[float, ...]:
        """Second difference of each direction at the center; empty where the grid has none."""
        found = [second_difference(self.alphas, row) for row in self.losses]
        return tuple(value for value in found if value is not None)

    def radii(self, rise: float) -> tuple[float, ...]:
        """Distance at which the loss has risen by a part of that at the center, of each direction; inf beyond reach."""
        level = self.center_loss + rise * abs(self.center_loss)
        return tuple(crossing_radius([self.alphas], row, level, self.center_loss) for row in self.losses)

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log; ``<quantity>_stderr`` is the standard error of a mean over the directions."""
        values = {"center_loss": self.center_loss, "num_directions": float(len(self.losses))}
        values["num_nonfinite"] = float(self.num_nonfinite)
        ends = self.losses[:, [0, -1]].mean(1)
        for name, numbers in (
            ("curvature", self.curvatures),
            ("radius_50", self.radii(0.5)),
            ("end_loss", ends.tolist()),
        ):
            values |= _mean_and_error(name, torch.tensor(numbers, dtype=torch.float64))
        values["relative_spread"] = _largest(self.losses.std(0) / self.mean.abs())
        if self.routing_flips is not None:
            values["flips_max"] = _largest(self.routing_flips)
        if self.losses_fixed_routing is not None:
            values["routing_gap_max"] = _largest((self.losses - self.losses_fixed_routing).abs())
        values |= {"num_samples": float(self.num_samples)} | ({"partial": 1.0} if self.partial else {})
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Mean over the directions, with the band between their quantiles and that of fixed routing.

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        figure, ax = axes_of(ax, CARD)
        alphas = self.alphas.numpy()
        low, high = self.quantile(_LOW), self.quantile(_HIGH)
        ax.fill_between(alphas, low.numpy(), high.numpy(), alpha=0.25, label=f"{_LOW:.0%} to {_HIGH:.0%} of them")
        ax.plot(alphas, self.mean.numpy(), marker=".", markersize=4, label="mean")
        if self.losses_fixed_routing is not None:
            fixed = self.losses_fixed_routing.mean(0).numpy()
            ax.plot(alphas, fixed, linestyle="--", color="tab:green", label="mean at fixed routing")
        lost = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        ax.set_xlabel("α (step along the direction)", fontsize=8)
        ax.set_ylabel("loss", fontsize=8)
        legend_above(ax, f"{len(self.losses)} random directions ({self.num_samples} samples{lost})")
        return figure, ax

    def summary(self) -> str:
        """Markdown table of the numbers."""
        rows = [(name.replace("_", " "), f"{value:.5g}") for name, value in self.metrics().items()]
        notes = [f"Spread is that over the directions at one step. {len(self.alphas)} steps along each."]
        if self.num_nonfinite:
            notes.append(f"{self.num_nonfinite} points have a loss that is nan or inf: no mean and no band there.")
        if self.partial:
            notes.append(f"**Partial**: {self.partial}; {self.num_unmeasured} directions are missing.")
        return "\n".join([markdown_table(("quantity", "value"), rows), *(f"\n{note}" for note in notes)])

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write an ``.npz``: ``alphas``, ``losses`` and those of the other tensors that are there, ``center_loss``."""
        tensors = {"losses_fixed_routing": self.losses_fixed_routing, "routing_flips": self.routing_flips}
        arrays: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        arrays |= {"alphas": self.alphas, "losses": self.losses, "center_loss": self.center_loss}
        np.savez(file, **arrays)


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if len(finite) else math.nan


def _mean_and_error(name: str, numbers: Tensor) -> dict[str, float]:
    if len(numbers) < 2:
        return {}
    return {name: float(numbers.mean()), f"{name}_stderr": float(numbers.std() / math.sqrt(len(numbers)))}
