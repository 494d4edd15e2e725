"""What a loss landscape analysis found, and how it is reported."""

import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moe_heads.analysis.loss_landscape.arrays import save_arrays
from moe_heads.analysis.loss_landscape.figures import plot_line, plot_plane
from moe_heads.analysis.loss_landscape.measured import MeasuredLandscape
from moe_heads.analysis.loss_landscape.mesh import surface_mesh, triangles
from moe_heads.analysis.loss_landscape.numbers import landscape_metrics, landscape_summary
from moe_heads.checks import check_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LossLandscapeResult", "Quantity"]

Quantity = Literal["losses", "losses_fixed_routing", "routing_flips", "accuracies"]
"""A field that can be drawn as a map."""

_LOSSES = ("losses", "losses_fixed_routing")


@dataclass(frozen=True, eq=False)
class LossLandscapeResult(MeasuredLandscape):
    """A landscape as it is logged, drawn and written; what it holds is in `MeasuredLandscape`."""

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write all arrays and numbers into an ``.npz`` file; see `landscape.arrays`."""
        save_arrays(self, file)

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log: losses, curvatures and their checks, radii, flips and what they do; see docs."""
        return landscape_metrics(self)

    def plot(self, ax: "Axes | None" = None, quantity: Quantity = "losses") -> "tuple[Figure, Axes]":
        """Curve of the loss (1-D, with all that was measured beside it) or map with contour lines (2-D).

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
            quantity: What a map shows, one of ``maps``. The loss at fixed routing has the colors of the loss.

        Raises:
            ValueError: If it was not measured, or there is no plane to show it on.
        """
        check_option("quantity", quantity, self.maps or ("losses",))
        title = self._title(quantity)
        if self.betas is not None:
            is_loss = quantity in _LOSSES
            return plot_plane(
                self.alphas.numpy(),
                self.betas.numpy(),
                getattr(self, quantity).numpy(),
                quantity="mean loss" if is_loss else "share of samples" if quantity == "routing_flips" else "accuracy",
                limits=self._loss_limits if is_loss else (0.0, 1.0) if quantity == "routing_flips" else None,
                scale=self.scale if is_loss else "linear",
                title=title,
                trajectory=self.trajectory,
                ax=ax,
            )
        fixed, flips = (None if v is None else v.numpy() for v in (self.losses_fixed_routing, self.routing_flips))
        return plot_line(
            self.alphas.numpy(),
            self.losses.numpy(),
            center_loss=self.center_loss,
            fixed=fixed,
            routing_flips=flips,
            flip=self.flip,
            scale=self.scale,
            title=title,
            ax=ax,
        )

    @property
    def maps(self) -> tuple[Quantity, ...]:
        """What of a plane can be drawn and has something to show, the loss first; empty for a line."""
        if self.betas is None:
            return ()
        flips, fixed = self.routing_flips, self.losses_fixed_routing
        has_flips = flips is not None and bool((flips > 0).any())
        shown: dict[Quantity, bool] = {
            "losses": True,
            "losses_fixed_routing": fixed is not None and has_flips,
            "routing_flips": has_flips,
            "accuracies": self.accuracies is not None,
        }
        return tuple(quantity for quantity, is_shown in shown.items() if is_shown)

    @property
    def _loss_limits(self) -> tuple[float, float] | None:
        """Smallest and largest loss, free or at fixed routing, so that one color is one loss."""
        losses = [values for name in _LOSSES if (values := getattr(self, name)) is not None]
        finite = torch.cat([values[values.isfinite()] for values in losses])
        if self.scale == "log":
            finite = finite[finite > 0]
        return (float(finite.min()), float(finite.max())) if len(finite) else None

    def _title(self, quantity: Quantity) -> str:
        lost = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        lost += f", {self.num_unmeasured} points not measured" if self.num_unmeasured else ""
        what = {
            "losses": f"loss {self.center_loss:.4g} at the center",
            "losses_fixed_routing": f"loss at fixed routing, {self.center_loss:.4g} at the center",
            "routing_flips": f"{self.flip} than at the center",
            "accuracies": f"accuracy {self.center_accuracy or 0.0:.4g} at the center",
        }
        return f"{what[quantity]} ({self.num_samples} samples{lost})"

    @property
    def has_surface(self) -> bool:
        """Whether there is a plane with at least one triangle of finite points: what `mesh` needs."""
        return self.betas is not None and len(triangles(self.losses.isfinite())) > 0

    def mesh(self, tilt: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
        """The surface of a plane as vertices, faces and colors for ``SummaryWriter.add_mesh``; see `surface_mesh`.

        Args:
            tilt: Degrees by which the surface is tipped backwards: TensorBoard's camera would see it from above.

        Raises:
            ValueError: For a line.
        """
        if self.betas is None:
            raise ValueError("mesh: expected a landscape on a plane (direction2), got one along a line")
        return surface_mesh(self.alphas, self.betas, self.losses, scale=self.scale, tilt=tilt)

    def summary(self) -> str:
        """Markdown table of the numbers, and a sentence on what the reader has to know."""
        return landscape_summary(self)
