"""Curvature of a slice compared with the Hessian, and the width of a basin."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CurvatureCheck", "check_curvature", "crossing_radius", "largest_rise", "second_difference"]

# Relative rise of the loss at the step of a check, in square roots of the rounding error. The rounding error of the
# curvature falls with the step: at this step it is below a thousandth in float32.
_RISE = 3.0
# Factor by which the error estimates may be too small.
_SAFETY = 2.0


@dataclass(frozen=True)
class CurvatureCheck:
    r"""Curvature of the slice along a direction d, compared with :math:`d^\top H d` from a Hessian-vector product.

    Attributes:
        exact: :math:`d^\top H d` from a Hessian-vector product, with H at fixed routing.
        second_difference: :math:`(L(h) - 2 L(0) + L(-h)) / h^2`, of the loss at fixed routing if there is one.
        step: h, at which the loss should rise by a thousandth in float32 and by less in float64, but at most the
            spacing of the grid.
        truncation: Estimate of the truncation error of the second difference: a third of its change from h to 2h. It
            includes rounding noise.
        rounding: Bound of the rounding error of the second difference, :math:`4 \epsilon |L| / h^2`.
        direction: Number of the direction, from 1.
    """

    exact: float
    second_difference: float
    step: float
    truncation: float
    rounding: float
    direction: int = 1

    @property
    def agrees(self) -> bool:
        """True if the two differ by at most twice the truncation and rounding errors."""
        return abs(self.second_difference - self.exact) <= _SAFETY * (abs(self.truncation) + self.rounding)


def check_curvature(
    loss_at: Callable[[float], float], center_loss: float, exact: float, spacing: float, epsilon: float
) -> CurvatureCheck:
    """Measure the second difference of a slice at a suitable step, which takes four more points.

    Args:
        loss_at: Returns the loss at a coordinate.
        center_loss: Loss at zero.
        exact: The curvature to compare with.
        spacing: Largest step.
        epsilon: Relative rounding error of a loss.
    """
    step = spacing
    if exact and center_loss:
        step = min(spacing, math.sqrt(2 * _RISE * math.sqrt(epsilon) * abs(center_loss / exact)))
    near, far = (
        (loss_at(distance) - 2 * center_loss + loss_at(-distance)) / distance**2 for distance in (step, 2 * step)
    )
    rounding = 4 * epsilon * abs(center_loss) / step**2
    return CurvatureCheck(exact, near, step, (far - near) / 3, rounding)


def second_difference(axis: Tensor, losses: Tensor) -> float | None:
    """Return the second difference of the nearest points at equal distance from zero, or None if there are none."""
    before, after = axis[axis < 0].flip(0), axis[axis > 0]
    if not bool((axis == 0).any()):
        return None
    for distance in after.tolist():
        if not len(before):
            return None
        nearest = before[(before + distance).abs().argmin()]
        if torch.isclose(nearest, -after.new_tensor(distance), rtol=1e-6):
            left, center, right = (float(losses[axis == place][0]) for place in (nearest, 0.0, distance))
            difference: float = (left - 2 * center + right) / distance**2
            return difference
    return None


def crossing_radius(axes: Sequence[Tensor], losses: Tensor, level: float, center_loss: float) -> float:
    """Return the smallest distance from the center at which the linearly interpolated loss reaches a level.

    The search follows the lines of the grid. If the center is not on the grid, it also follows the lines from the
    center to its neighbors. A loss that is inf or nan is above any level, at its own place.

    Returns:
        The distance in units of the coordinates, or inf if the level is not reached on the grid.
    """
    above = ~(losses < level)
    radius = _crossing_from_center(axes, losses, level, center_loss)
    for dim, axis in enumerate(axes):
        here, there = (losses.narrow(dim, start, len(axis) - 1) for start in (0, 1))
        up_here, up_there = (above.narrow(dim, start, len(axis) - 1) for start in (0, 1))
        places = torch.meshgrid(*axes, indexing="ij")
        lower = [place.narrow(dim, 0, len(axis) - 1) for place in places]
        upper = [place.narrow(dim, 1, len(axis) - 1) for place in places]
        share = (level - here) / (there - here)
        # without a finite slope, the end that is above
        share = torch.where(share.isfinite() & here.isfinite() & there.isfinite(), share, up_there.to(share.dtype))
        crossed = up_here != up_there
        squares = sum((low + share * (high - low)).square() for low, high in zip(lower, upper, strict=True))
        assert isinstance(squares, Tensor)
        if bool(crossed.any()):
            radius = min(radius, float(squares[crossed].min().sqrt()))
    return radius


def _crossing_from_center(axes: Sequence[Tensor], losses: Tensor, level: float, center_loss: float) -> float:
    """Return the smallest such distance on the lines from the center to its neighbors on the grid."""
    sides = [_around_zero(axis) for axis in axes]
    around = losses[torch.meshgrid(*sides, indexing="ij")]
    places = torch.meshgrid(*(axis[side] for axis, side in zip(axes, sides, strict=True)), indexing="ij")
    distances = torch.stack(places).square().sum(0).sqrt()
    shares = torch.where(around.isfinite(), (level - center_loss) / (around - center_loss), 1.0)
    crossed = ~(around < level) & (distances > 0)
    return float((shares * distances)[crossed].min()) if bool(crossed.any()) else math.inf


def _around_zero(axis: Tensor) -> Tensor:
    """Return the index of zero on an axis, or the indices of its neighbors."""
    if bool((axis == 0).any()):
        return (axis == 0).nonzero()[0]
    first_above = int((axis < 0).sum())
    return torch.arange(max(first_above - 1, 0), min(first_above + 1, len(axis)))


def largest_rise(axes: Sequence[Tensor], losses: Tensor, center_loss: float, radius: float) -> float:
    """Return the largest loss at a distance of at most ``radius``, minus the center loss.

    Returns:
        The rise, at least 0. It is inf if a loss is not finite, and nan if there is no point but the center.
    """
    distances = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    inside = losses[(distances > 0) & (distances <= radius * (1 + 1e-9))]
    if not len(inside):
        return math.nan
    return max(0.0, float((inside - center_loss).max())) if bool(inside.isfinite().all()) else math.inf
