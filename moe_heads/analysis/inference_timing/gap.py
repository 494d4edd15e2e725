"""The gap between the arithmetic and the time that a head saves, beside a dense head of equal capacity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moe_heads.analysis.inference_timing.intervals import DRIFT, Rounds, bootstrap_interval, containing, paired
from moe_heads.analysis.inference_timing.roofline import Bound
from moe_heads.analysis.inference_timing.rounds import Cache
from moe_heads.analysis.inference_timing.row import TimingMode
from moe_heads.capacity import capacity, match_capacity
from moe_heads.head import Head

__all__ = ["Gap", "GapPoint", "Standing", "break_even", "dense_twin", "gap_of", "realized_ratio"]

# as in the study's comparison: small heads have few units, and one more is a few percent
_TOLERANCE = 0.05
_EXTREME = 1e9

Standing = Literal["faster", "slower", "undecided"]
_PHRASES: Mapping[Standing, str] = {
    "faster": "faster than the dense head",
    "slower": "slower than the dense head",
    "undecided": "no faster or slower than the dense head by more than the error",
}


@dataclass(frozen=True)
class GapPoint:
    """One batch size of a gap; ratios are those of the dense head to the other: above one the other is faster.

    Attributes:
        batch_size: Samples of the batch.
        mode: How both heads ran.
        theoretical: Ratio of the floating point operations, the active ones of a sparse head.
        realized: Ratio of the median times, of runs that took turns.
        low: Lower end of its 95 % interval of the sampling (block bootstrap over the rounds).
        high: Upper end.
        bound: Ratio of the least times that the device would need, see `Limits.bound`; None outside eager mode, and
            where the arithmetic of an operator is not known.
        dense_bound: Least time of the dense head, and what it is made of.
        head_bound: Least time of the head.
    """

    batch_size: int
    mode: TimingMode
    theoretical: float
    realized: float
    low: float
    high: float
    bound: float | None = None
    dense_bound: Bound | None = None
    head_bound: Bound | None = None

    def standing(self, allowance: float) -> Standing:
        """Whether the head is faster than the dense one, as far as interval and allowance tell.

        Args:
            allowance: Share of the ratio by which its interval is stretched at both ends.
        """
        if self.low > 1 + allowance:
            return "faster"
        return "slower" if self.high < 1 - allowance else "undecided"


@dataclass(frozen=True)
class Gap:
    """Theoretical and realized speed of a head over batch sizes, in one mode.

    Attributes:
        head: Name of the head.
        mode: How both heads ran.
        parameters: Parameters of the head.
        dense_parameters: Parameters of the dense head that `match_capacity` built for it.
        points: One for each batch size, ascending.
        break_even: Batch size from which on the head is faster, interpolated between sizes on logarithmic axes; None
            where there is no such crossing in the range, or where the largest size does not tell.
        break_even_low: Where the upper ends of the intervals cross, or the smallest size if they do not.
        break_even_high: Where the lower ends cross.
        cache: What the caches held before the runs of both.
        allowance: For drift between runs, a share of each ratio: that of the two medians, in quadrature.
    """

    head: str
    mode: TimingMode
    parameters: int
    dense_parameters: int
    points: tuple[GapPoint, ...]
    break_even: float | None
    break_even_low: float | None = None
    break_even_high: float | None = None
    cache: Cache = "warm"
    allowance: float = math.sqrt(2) * DRIFT

    def verdict(self) -> str:
        """In words, where the head is faster than the dense one, as far as the intervals tell."""
        found: dict[Standing, list[str]] = {}
        for point in self.points:
            found.setdefault(point.standing(self.allowance), []).append(f"{point.batch_size}")
        if len(found) == 1:
            (standing,) = found
            sizes = f"at every batch size from {self.points[0].batch_size} to {self.points[-1].batch_size}"
            return f"{_PHRASES[standing]} {sizes}"
        if self.break_even is not None:
            between = f"{self.break_even_low:.3g} to {self.break_even_high:.3g}"
            return f"faster than the dense head from a batch of about {self.break_even:.3g} on ({between})"
        return "; ".join(f"{_PHRASES[standing]} at batch {', '.join(sizes)}" for standing, sizes in found.items())


def gap_of(head: str, mode: TimingMode, cache: Cache, heads: tuple[Head, Head], points: Sequence[GapPoint]) -> Gap:
    """The gap of a head, with its break-even.

    Args:
        head: Name of the head.
        mode: How both heads ran.
        cache: What the caches held.
        heads: The head and the dense one.
        points: One for each batch size, ascending.
    """
    parameters, dense_parameters = (capacity(module).total for module in heads)
    gap = Gap(head, mode, parameters, dense_parameters, tuple(points), None, cache=cache)
    sizes = [point.batch_size for point in points]
    crossing = break_even(sizes, [point.realized for point in points])
    # the largest size tells when the lower ends cross as well
    high = break_even(sizes, [point.low / (1 + gap.allowance) for point in points])
    if crossing is None or high is None:
        return gap
    low = break_even(sizes, [point.high * (1 + gap.allowance) for point in points])
    low = float(sizes[0]) if low is None else low
    return replace(gap, break_even=crossing, break_even_low=min(low, crossing), break_even_high=max(high, crossing))


def dense_twin(head: Head) -> Head:
    """An untrained dense head of the same capacity (total parameters) on the same device; the time is the same.

    Raises:
        ValueError: If none comes within 5 %.
    """
    sizes = head.in_features, head.num_classes
    twin = match_capacity("dense", *sizes, total=capacity(head).total, tolerance=_TOLERANCE)
    parameter = next(head.parameters())
    return twin.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def realized_ratio(dense: Rounds, head: Rounds, seed: int) -> tuple[float, float, float]:
    """Ratio of the median times in the rounds that both took part in, and the interval of its sampling."""
    rounds = paired([dense, head])
    medians = [float(np.median([time for found in module for time in found])) for module in rounds]
    ratio = medians[0] / medians[1]
    low, high = containing(ratio, bootstrap_interval(lambda dense, head: dense / head, rounds, seed))
    return ratio, max(low, 0.0), high


def break_even(sizes: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Batch size at which a ratio rises above one for good, linear in the logarithms of size and ratio.

    Args:
        sizes: Batch sizes, ascending.
        ratios: Ratio at each; what is zero or infinite is taken for very small or very large.

    Returns:
        The last crossing upwards, if the ratio stays above one from there on; else None.

    Example:
        >>> from moe_heads.analysis.inference_timing.gap import break_even
        >>> break_even([1, 16, 256], [0.5, 2.0, 3.0])
        4.0
    """
    if not ratios or ratios[-1] <= 1:
        return None
    clipped = np.clip(ratios, 1 / _EXTREME, _EXTREME)
    logs = list(zip(np.log2(sizes).tolist(), np.log2(clipped).tolist(), strict=True))
    for (x0, y0), (x1, y1) in zip(logs[-2::-1], logs[:0:-1], strict=True):
        if y0 <= 0:
            return float(2 ** (x0 - y0 * (x1 - x0) / (y1 - y0)))
    return None
