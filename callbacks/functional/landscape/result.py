"""What a loss landscape analysis found, and how it is reported."""

import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from torch import Tensor

from moe_heads.callbacks.functional.landscape.arrays import save_arrays
from moe_heads.callbacks.functional.landscape.figure import plot_line, plot_plane
from moe_heads.callbacks.functional.landscape.measured import MeasuredLandscape
from moe_heads.callbacks.functional.landscape.mesh import surface_mesh, triangles
from moe_heads.callbacks.functional.landscape.numbers import landscape_metrics, landscape_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LossLandscapeResult"]


@dataclass(frozen=True, eq=False)
class LossLandscapeResult(MeasuredLandscape):
    """A landscape as it is logged, drawn and written; what it holds is in `MeasuredLandscape`."""

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write all arrays and numbers into an ``.npz`` file; see `landscape.arrays`."""
        save_arrays(self, file)

    def metrics(self) -> dict[str, float]:
        """The finite numbers to log: losses, curvatures and their checks, radii, flips and what they do; see docs."""
        return landscape_metrics(self)

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Curve of the loss (1-D, with the routing flips on a second axis) or map with contour lines (2-D).

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        lost = f", {self.num_nonfinite} points not finite" if self.num_nonfinite else ""
        lost += f", {self.num_unmeasured} points not measured" if self.num_unmeasured else ""
        title = f"loss {self.center_loss:.4g} at the centre ({self.num_samples} samples{lost})"
        if self.betas is not None:
            return plot_plane(
                self.alphas.numpy(),
                self.betas.numpy(),
                self.losses.numpy(),
                scale=self.scale,
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
            scale=self.scale,
            title=title,
            ax=ax,
        )

    @property
    def has_surface(self) -> bool:
        """Whether there is a plane with at least one triangle of finite points: what `mesh` needs."""
        return self.betas is not None and len(triangles(self.losses.isfinite())) > 0

    def mesh(self, tilt: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
        """The surface of a plane as vertices, faces and colours for ``SummaryWriter.add_mesh``; see `surface_mesh`.

        Args:
            tilt: Degrees by which the surface is tipped backwards: TensorBoard's camera would see it from above.

        Raises:
            ValueError: For a line.
        """
        if self.betas is None:
            raise ValueError("mesh: expected a landscape on a plane (direction2); got one along a line")
        return surface_mesh(self.alphas, self.betas, self.losses, scale=self.scale, tilt=tilt)

    def summary(self) -> str:
        """Markdown table of the numbers, and a sentence on what the reader has to know."""
        return landscape_summary(self)
