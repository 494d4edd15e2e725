"""The numbers of a loss landscape, and what follows from them without measuring more."""

import math
from dataclasses import dataclass

from torch import Tensor

from moe_heads.analysis.loss_landscape.figures import Scale
from moe_heads.analysis.loss_landscape.trajectory import Trajectory
from moe_heads.analysis.loss_landscape.validity import (
    CurvatureCheck,
    crossing_radius,
    largest_rise,
    second_difference,
)

__all__ = ["MeasuredLandscape"]

# A surface whose finite losses span more than this factor is shown on a logarithmic scale.
_LOG_RATIO = 100.0


@dataclass(frozen=True, eq=False)
class MeasuredLandscape:
    r"""Mean loss along a line (1-D) or on a plane (2-D) of the parameters; all tensors float64 on the CPU.

    Attributes:
        alphas: Coordinates along the first direction, (A,).
        betas: Coordinates along the second direction, (B,); None in 1-D.
        losses: Mean loss over the samples, (A,) or (A, B); nan and inf as the model gave them.
        accuracies: Mean of ``accuracy_fn``, same shape; None when not asked for.
        routing_flips: Share of the samples (0 to 1) whose set of chosen experts is not that at the center, same shape;
            the mean over the heads. A soft router chooses its largest gate. None when no router ran.
        center_loss: Loss of the model as it is, measured by itself.
        center_accuracy: Accuracy of the model as it is; None when not asked for.
        num_samples: Samples of the loss.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Points that the analysis did not come to; nan in every tensor. Zero unless it is partial.
        partial: Why the analysis ended before its time; "" for one that is whole.
        losses_fixed_routing: Mean loss with the choices of the center held, same shape as ``losses``: what remains of
            the difference between dense and sparse heads when no sample changes its experts. None without a sparse
            head, or where it was not asked for.
        checks: For each flat direction, where it was asked for, the curvature of the slice beside that of the Hessian.
        direction_norms: Length of each direction, in units of the parameters: of a step by 1.
        reused: Modules that were computed once for all points, since nothing moves in or before them.
        not_reused: Why they were not, although something lies before what moves; "" where they were.
        not_shared: Why accuracy or the loss at fixed routing took passes of their own; "" where they shared one.
        trajectory: The way of a training run on this plane; None where there is none.
        is_soft: Whether all routers that ran are soft ones: their loss does not jump at a flip.
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
    not_shared: str = ""
    trajectory: Trajectory | None = None
    is_soft: bool = False

    @property
    def flip(self) -> str:
        """What a routing flip is."""
        return "another largest gate" if self.is_soft else "other experts chosen"

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
        zero between two neighbors at equal distance; nan or inf where a loss is.
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
        """Distance from the center up to which the grid goes in every direction; 0 where it is on one side of it."""
        return max(0.0, min(min(-float(axis[0]), float(axis[-1])) for axis in self.axes))

    def radius(self, rise: float, *, relative: bool = True) -> float:
        """Smallest distance, in units of the coordinates, at which the loss has risen by some amount.

        Interpolated along the lines of the grid; a loss that is not finite has risen.

        Args:
            rise: The amount.
            relative: Whether it is a part of the loss at the center, or that many units of the loss.

        Returns:
            The distance; inf where the loss does not rise so far within the grid.
        """
        level = self.center_loss + rise * (abs(self.center_loss) if relative else 1.0)
        # what was not measured has not risen
        losses = self.losses if not self.num_unmeasured else self.losses.nan_to_num(-math.inf, posinf=math.inf)
        return crossing_radius(self.axes, losses, level, self.center_loss)

    def rise_within(self, radius: float) -> float:
        """Sharpness of the basin: the largest rise of the loss at the points within a distance.

        Returns:
            The rise, at least 0; inf if a loss is not finite; nan where no point lies so near, or one is not measured.
        """
        rise = largest_rise(self.axes, self.losses, self.center_loss, radius)
        return math.nan if self.num_unmeasured and math.isinf(rise) else rise

    @property
    def routing_gap(self) -> Tensor | None:
        """Loss with free routing less that with fixed routing; None without a sparse head."""
        return None if self.losses_fixed_routing is None else self.losses - self.losses_fixed_routing
