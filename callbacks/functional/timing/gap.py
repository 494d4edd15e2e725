"""The gap between the arithmetic and the time that a head saves, beside a dense head of equal capacity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_heads.callbacks.functional.timing.intervals import BETWEEN_RUNS, Rounds, bootstrap_interval, widened
from moe_heads.callbacks.functional.timing.roofline import Bound
from moe_heads.callbacks.functional.timing.row import TimingMode
from moe_heads.capacity import capacity, match_capacity
from moe_heads.head import Head

__all__ = ["Gap", "GapPoint", "break_even", "dense_twin", "realised_ratio"]

# as in the study's comparison: small heads have few units, and one more is a few percent
_TOLERANCE = 0.05


@dataclass(frozen=True)
class GapPoint:
    """One batch size of a gap; ratios are those of the dense head to the other: above one the other is faster.

    Attributes:
        batch_size: Samples of the batch.
        mode: How both heads ran.
        theoretical: Ratio of the floating point operations, the active ones of a sparse head.
        realised: Ratio of the median times, of runs that took turns.
        low: Lower end of its 95 % confidence interval (block bootstrap over the rounds).
        high: Upper end.
        bound: Ratio of the least times that the device would need, see `Limits.bound`; None outside eager mode.
        dense_bound: Least time of the dense head, and what it is made of.
        head_bound: Least time of the head.
    """

    batch_size: int
    mode: TimingMode
    theoretical: float
    realised: float
    low: float
    high: float
    bound: float | None = None
    dense_bound: Bound | None = None
    head_bound: Bound | None = None


@dataclass(frozen=True)
class Gap:
    """Theoretical and realised speed of a head over batch sizes, in one mode.

    Attributes:
        head: Name of the head.
        mode: How both heads ran.
        parameters: Parameters of the head.
        dense_parameters: Parameters of the dense head that `match_capacity` built for it.
        points: One for each batch size, ascending.
        break_even: Batch size from which on the head is faster, interpolated between sizes on logarithmic axes; None
            where there is no such crossing in the range.
    """

    head: str
    mode: TimingMode
    parameters: int
    dense_parameters: int
    points: tuple[GapPoint, ...]
    break_even: float | None

    def verdict(self) -> str:
        """In words, where the head is faster than the dense one."""
        sizes = f"{self.points[0].batch_size} to {self.points[-1].batch_size}"
        if self.break_even is not None:
            return f"faster than the dense head from a batch of about {self.break_even:.3g} on"
        if all(point.realised > 1 for point in self.points):
            return f"faster than the dense head at every batch size from {sizes}"
        if all(point.realised <= 1 for point in self.points):
            return f"slower than the dense head at every batch size from {sizes}"
        return f"faster than the dense head at some batch sizes from {sizes}, not at the largest"


def dense_twin(head: Head) -> Head:
    """An untrained dense head of the same capacity (total parameters) on the same device; the time is the same.

    Raises:
        ValueError: If none comes within 5 %.
    """
    sizes = head.in_features, head.num_classes
    twin = match_capacity("dense", *sizes, total=capacity(head).total, tolerance=_TOLERANCE)
    parameter = next(head.parameters())
    return twin.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def realised_ratio(dense: Rounds, head: Rounds, seed: int) -> tuple[float, float, float]:
    """Ratio of the median times, and its interval."""
    medians = [float(torch.tensor([t for found in rounds for t in found]).quantile(0.5)) for rounds in (dense, head)]
    ratio = medians[0] / medians[1]
    ends = bootstrap_interval(lambda dense, head: dense / head, [dense, head], seed)
    low, high = widened(ratio, ends, math.sqrt(2) * BETWEEN_RUNS * ratio)
    return ratio, max(low, 0.0), high


def break_even(sizes: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Batch size at which a ratio rises above one for good, linear in the logarithms of size and ratio.

    Args:
        sizes: Batch sizes, ascending.
        ratios: Ratio at each, positive.

    Returns:
        The last crossing upwards, if the ratio stays above one from there on; else None.

    Example:
        >>> from moe_heads.callbacks.functional.timing.gap import break_even
        >>> break_even([1, 16, 256], [0.5, 2.0, 3.0])
        4.0
    """
    if not ratios or ratios[-1] <= 1:
        return None
    logs = [(math.log2(size), math.log2(ratio)) for size, ratio in zip(sizes, ratios, strict=True)]
    for (x0, y0), (x1, y1) in zip(logs[-2::-1], logs[:0:-1], strict=True):
        if y0 <= 0:
            return float(2 ** (x0 - y0 * (x1 - x0) / (y1 - y0)))
    return None
