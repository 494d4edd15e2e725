"""Coordinates along a direction, which include the center where possible."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["grid_of", "grid_through_zero", "numbers_of", "widest_gap"]

# Intervals below this fraction of the mean spacing are not halved. Otherwise all points would gather at a jump.
_FINEST = 1 / 32


def grid_of(name: str, values: Sequence[float] | Tensor | None, reach: float, num_points: int) -> Tensor:
    """Return the given coordinates, or ``num_points`` equidistant ones in [-reach, reach], as float64.

    A coordinate that differs from zero only by rounding becomes zero: `torch.linspace` misses the zero in its middle.

    Raises:
        ValueError: If they are not finite and increasing.
    """
    if values is None:
        # from whole numbers, so that the middle of an odd grid is exactly zero
        steps = torch.arange(num_points, dtype=torch.float64) * 2 - (num_points - 1)
        return steps * (reach / (num_points - 1))
    grid = numbers_of(name, values)
    if grid.dim() != 1 or len(grid) < 2 or not bool(grid.isfinite().all()) or not bool((grid.diff() > 0).all()):
        raise ValueError(f"{name}: expected at least two finite, increasing numbers, got {grid.tolist()}.")
    return torch.where(grid.abs() < 1e-6 * grid.diff().min(), 0, grid)


def numbers_of(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """Return numbers as a float64 tensor on the CPU.

    Raises:
        ValueError: If they are not numbers.
    """
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a list of numbers, got {values!r}.") from None


def grid_through_zero(values: Tensor, num_points: int, margin: float = 0.2) -> Tensor:
    """Return equidistant coordinates that include zero and extend beyond the values by a fraction of their span.

    Args:
        values: Values that lie inside, like zero.
        num_points: Number of coordinates, at least 3.
        margin: Fraction of the span that is added at each end.

    Returns:
        The coordinates, float64.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.loss_landscape.grid import grid_through_zero
        >>> grid_through_zero(torch.tensor([3.0]), 6, margin=0.5).tolist()
        [-1.5, 0.0, 1.5, 3.0, 4.5, 6.0]
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    span = (high - low) or 1.0
    low, high = low - margin * span, high + margin * span
    # one spacing wider than the range, so that the grid still covers it after the shift onto zero
    step = (high - low) / (num_points - 2)
    first = int(low // step)
    return (torch.arange(num_points, dtype=torch.float64) + first) * step


def widest_gap(alphas: Tensor, losses: Tensor) -> float | None:
    r"""Return the middle of the interval in which linear interpolation is estimated to miss the loss the most.

    The error of linear interpolation over a distance h is at most :math:`h^2 |L''| / 8`. L'' is the larger of the
    second divided differences at the two ends. Intervals with an end that is not finite have no estimate.

    Returns:
        The middle, or None if no interval can be halved.
    """
    if len(alphas) < 3:
        return None
    distances, slopes = alphas.diff(), losses.diff() / alphas.diff()
    bends = 2 * (slopes.diff() / (alphas[2:] - alphas[:-2])).abs()
    bends = torch.cat([bends[:1], bends, bends[-1:]]).nan_to_num(0.0, posinf=0.0)
    errors = distances.square() * torch.maximum(bends[:-1], bends[1:]) / 8
    span = alphas[-1] - alphas[0]
    usable = losses.isfinite()[:-1] & losses.isfinite()[1:] & (distances > 2 * _FINEST * span / (len(alphas) - 1))
    errors = torch.where(usable, errors, 0.0)
    worst = int(errors.argmax())
    return float(alphas[worst] + alphas[worst + 1]) / 2 if errors[worst] > 0 else None
