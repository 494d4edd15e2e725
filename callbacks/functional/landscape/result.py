"""What a loss landscape analysis found, and how it is reported."""

import math
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from torch import Tensor

from moe_heads.callbacks.functional.landscape.arrays import save_arrays
from moe_heads.callbacks.functional.landscape.figure import Scale, plot_line, plot_plane
from moe_heads.callbacks.functional.landscape.mesh import surface_mesh, triangles
from moe_heads.callbacks.functional.landscape.numbers import landscape_metrics, landscape_summary
from moe_heads.callbacks.functional.landscape.trajectory import Trajectory
from moe_heads.callbacks.functional.landscape.validity import (
    CurvatureCheck,
    crossing_radius,
    largest_rise,
    second_difference,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LossLandscapeResult"]

# A surface whose finite losses span more than this factor is shown on a logarithmic scale.
_LOG_RATIO = 100.0


@dataclass(frozen=True, eq=False)
class LossLandscapeResult:
    r"""Mean loss along a line (1-D) or on a plane (2-D) of the parameters; all tensors float64 on the CPU.

    Attributes:
        alphas: Coordinates along the first direction, (A,).
        betas: Coordinates along the second direction, (B,); None in 1-D.
        losses: Mean loss over the samples, (A,) or (A, B); nan and inf as the model gave them.
        accuracies: Mean of ``accuracy_fn``, same shape; None when not asked for.
        routing_flips: Share of the samples (0 to 1) whose set of chosen experts is not that at the centre, same shape;
            the mean over the heads. A soft router chooses its largest gate. None when no router ran.
        center_loss: Loss of the model as it is, measured by itself.
        center_accuracy: Accuracy of the model as it is; None when not asked for.
        num_samples: Samples of the loss.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Points that the analysis did not come to; nan in every tensor. Zero unless it is partial.
        partial: Why the analysis ended before its time; "" for one that is whole.
        losses_fixed_routing: Mean loss with the choices of the centre held, same shape as ``losses``: what remains of
            the difference between dense and sparse heads when no sample changes its experts. None without a sparse
            head, or where it was not asked for.
        checks: For each direction whose curvature was asked for, that of the slice beside that of the Hessian.
        direction_norms: Length of each direction, in units of the parameters: of a step by 1.
        reused: Modules that were computed once for all points, since nothing moves in or before them.
        not_reused: Why they were not, although something lies before what moves; "" where they were.
        trajectory: The way of a training run on this plane; None where there is none.
    """

    alphas: Tensor
    betas: Tensor | None
    losses: Tensor
    accuracies: Tensor | None
    routing_flips: Tensor | None
    center_loss: float
    center_accuracy: float | None
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""
    losses_fixed_routing: Tensor | None = None
    checks: tuple[CurvatureCheck, ...] = ()
    direction_norms: tuple[float, ...] = ()
    reused: tuple[str, ...] = ()
    not_reused: str = ""
    trajectory: Trajectory | None = None

    @property
    def axes(self) -> tuple[Tensor, ...]:
        """Coordinates along each direction."""
        return (self.alphas,) if self.betas is None else (self.alphas, self.betas)

    @property
    def num_nonfinite(self) -> int:
        """Points whose loss was measured and is nan or inf."""
        return int((~self.losses.isfinite()).sum()) - self.num_unmeasured

    @property
    def num_nan(self) -> int:
        """Points whose loss was measured and is nan."""
        return int(self.losses.isnan().sum()) - self.num_unmeasured

    @property
    def scale(self) -> Scale:
        """Scale of the loss in figures and mesh: log when positive losses span a factor of more than 100."""
        finite = self.losses[self.losses.isfinite()]
        wide = len(finite) > 0 and bool(finite.min() > 0) and bool(finite.max() > _LOG_RATIO * finite.min())
        return "log" if wide else "linear"

    @property
    def curvatures(self) -> tuple[float, ...]:
        r"""Second difference :math:`(L(h) - 2 L(0) + L(-h)) / h^2` along each direction, h the distance of the points.

        Along a unit eigenvector it estimates the eigenvalue, with an error of order h². Empty unless both grids hold
        zero between two neighbours at equal distance; nan or inf where a loss is.
        """
        curvatures = []
        for dim, axis in enumerate(self.axes):
            line = self.losses
            for other in reversed(range(len(self.axes))):
                if other != dim and not bool((self.axes[other] == 0).any()):
                    return ()
                line = line if other == dim else line.select(other, int((self.axes[other] == 0).nonzero()))
            found = second_difference(axis, line)
            if found is None:
                return ()
            curvatures.append(found)
        return tuple(curvatures)

    @property
    def reach(self) -> float:
        """Distance from the centre up to which the grid goes in every direction."""
        return min(min(-float(axis[0]), float(axis[-1])) for axis in self.axes)

    def radius(self, rise: float, *, relative: bool = True) -> float:
        """Smallest distance, in units of the coordinates, at which the loss has risen by some amount.

        Interpolated along the lines of the grid; a loss that is not finite has risen.

        Args:
            rise: The amount.
            relative: Whether it is a part of the loss at the centre, or that many units of the loss.

        Returns:
            The distance; inf where the loss does not rise so far within the grid.
        """
        level = self.center_loss + rise * (abs(self.center_loss) if relative else 1.0)
        # what was not measured has not risen
        losses = self.losses if not self.num_unmeasured else self.losses.nan_to_num(-math.inf, posinf=math.inf)
        return crossing_radius(self.axes, losses, level)

    def rise_within(self, radius: float) -> float:
        """Sharpness of the basin: the largest rise of the loss at the points within a distance; inf if not finite."""
        return largest_rise(self.axes, self.losses, self.center_loss, radius)

    @property
    def routing_gap(self) -> Tensor | None:
        """Loss with free routing less that with fixed routing; None without a sparse head."""
        return None if self.losses_fixed_routing is None else self.losses - self.losses_fixed_routing

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
