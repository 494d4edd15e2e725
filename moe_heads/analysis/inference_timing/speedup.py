"""Theoretical and realized speed of a head against a dense head of equal capacity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from moe_heads.analysis.inference_timing.calls import RowMode
from moe_heads.analysis.inference_timing.draws import DrawnRounds, bootstrap_draws
from moe_heads.analysis.inference_timing.limits import Bound
from moe_heads.analysis.inference_timing.statistics import DRIFT
from moe_heads.capacity import capacity, match_capacity
from moe_heads.experts import ACTIVATIONS, Activation
from moe_heads.flops import Flops
from moe_heads.head import Head
from moe_heads.moe_layer import MoELayer
from moe_heads.routed_module import RoutedModule

__all__ = ["Gap", "GapPoint", "WiderHead", "break_even", "dense_twin", "gap_of", "realized_ratio"]

Standing = Literal["faster", "slower", "undecided"]

# as in the study: small heads have few units, and one unit more is a few percent
_TOLERANCE = 0.05
_EXTREME = 1e9
_PHRASES: Mapping[Standing, str] = {
    "faster": "faster than the dense head",
    "slower": "slower than the dense head",
    "undecided": "not distinguishable from the dense head",
}


@dataclass(frozen=True)
class GapPoint:
    """Speed ratios at one batch size, dense head divided by head: above one, the head is faster.

    Attributes:
        batch_size: Samples of the batch.
        mode: Mode of both heads.
        theoretical: Ratio of the floating point operations, the active ones of a sparse head.
        realized: Ratio of the median times of interleaved runs.
        low: Lower end of its 95 % sampling interval (block bootstrap over the rounds).
        high: Upper end.
        bound: Ratio of the least times on this device, see `DeviceLimits.bound`; None outside eager mode, and where the
            arithmetic of an operator is unknown.
        dense_bound: Least time of the dense head, and its limit.
        head_bound: Least time of the head.
    """

    batch_size: int
    mode: RowMode
    theoretical: float
    realized: float
    low: float
    high: float
    bound: float | None = None
    dense_bound: Bound | None = None
    head_bound: Bound | None = None

    def standing(self, allowance: float) -> Standing:
        """Return whether the interval, widened by the relative ``allowance``, shows the head faster or slower."""
        if self.low > 1 + allowance:
            return "faster"
        return "slower" if self.high < 1 - allowance else "undecided"


@dataclass(frozen=True)
class WiderHead:
    """Speed of a widened head against the dense head of its capacity.

    Attributes:
        width: Hidden units of one expert.
        batch_size: Samples of the batch.
        realized: Time of the dense head divided by that of the head.
        low: Lower end of its 95 % sampling interval.
        high: Upper end.
    """

    width: int
    batch_size: int
    realized: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """Gap between theoretical and realized speed of a head over batch sizes, in one mode.

    Attributes:
        head: Name of the head.
        mode: Mode of both heads.
        parameters: Parameters of the head.
        dense_parameters: Parameters of the dense head from `match_capacity`.
        points: One point per batch size, ascending.
        break_even: Batch size from which on the head is faster, interpolated on logarithmic axes; None without such a
            crossing, or where the largest size is not significantly faster.
        break_even_low: Crossing of the upper ends of the intervals, or the smallest size.
        break_even_high: Crossing of the lower ends.
        allowance: Relative allowance for drift between runs: that of the two medians, in quadrature.
        wider: Speed of the head with more hidden units at the largest batch size, ascending, where the head itself is
            not faster; the last one is, unless none of them is.
    """

    head: str
    mode: RowMode
    parameters: int
    dense_parameters: int
    points: tuple[GapPoint, ...]
    break_even: float | None
    break_even_low: float | None = None
    break_even_high: float | None = None
    allowance: float = math.sqrt(2) * DRIFT
    wider: tuple[WiderHead, ...] = ()

    def verdict(self) -> str:
        """Return in words at which sizes the head is significantly faster than the dense head."""
        return "; ".join(filter(None, (self._by_batch_size(), self._by_width())))

    def headline(self) -> str:
        """Return the size from which on the head is faster, in a few words."""
        standings = {point.standing(self.allowance) for point in self.points}
        if standings == {"faster"}:
            return "faster at all sizes"
        if self.break_even is not None:
            return f"faster from batch size {self.break_even:.3g} on"
        if not self.wider:
            return "not faster at the largest batch size"
        last = self.wider[-1]
        if last.low > 1 + self.allowance:
            return f"faster with {last.width:,} units per expert"
        return f"not faster with up to {last.width:,} units per expert"

    def _by_width(self) -> str:
        if not self.wider:
            return ""
        last = self.wider[-1]
        measured = f"{last.realized:.3g} ({last.low:.3g} to {last.high:.3g}) at batch size {last.batch_size}"
        if last.low > 1 + self.allowance:
            return f"faster from about {last.width:,} hidden units of an expert on: {measured}"
        return f"not faster up to {last.width:,} hidden units of an expert either: {measured}"

    def _by_batch_size(self) -> str:
        sizes_by_standing: dict[Standing, list[str]] = {}
        for point in self.points:
            sizes_by_standing.setdefault(point.standing(self.allowance), []).append(f"{point.batch_size}")
        if len(sizes_by_standing) == 1:
            (standing,) = sizes_by_standing
            sizes = f"at every batch size from {self.points[0].batch_size} to {self.points[-1].batch_size}"
            return f"{_PHRASES[standing]} {sizes}"
        if self.break_even is not None:
            between = f"{self.break_even_low:.3g} to {self.break_even_high:.3g}"
            return f"faster than the dense head from a batch size of about {self.break_even:.3g} ({between})"
        return "; ".join(
            f"{_PHRASES[standing]} at batch size {', '.join(sizes)}" for standing, sizes in sizes_by_standing.items()
        )


def gap_of(head: str, mode: RowMode, heads: tuple[RoutedModule, RoutedModule], points: Sequence[GapPoint]) -> Gap:
    """Return the gap of a head and its dense twin with the break-even, from points of ascending batch sizes."""
    parameters, dense_parameters = (capacity(module).total for module in heads)
    gap = Gap(head, mode, parameters, dense_parameters, tuple(points), None)
    sizes = [point.batch_size for point in points]
    crossing = break_even(sizes, [point.realized for point in points])
    # the largest size is significantly faster if the lower ends cross as well
    high = break_even(sizes, [point.low / (1 + gap.allowance) for point in points])
    if crossing is None or high is None:
        return gap
    low = break_even(sizes, [point.high * (1 + gap.allowance) for point in points])
    low = float(sizes[0]) if low is None else low
    return replace(gap, break_even=crossing, break_even_low=min(low, crossing), break_even_high=max(high, crossing))


def dense_twin(module: RoutedModule) -> RoutedModule:
    """Build an untrained dense head, or layer, of equal capacity (total parameters) on the device of the module.

    Raises:
        ValueError: If no dense head is within 5 %.
    """
    num_outputs = int(getattr(module, "num_classes" if isinstance(module, Head) else "out_features"))
    total = capacity(module).total
    dense = match_capacity("dense", module.in_features, num_outputs, total=total, tolerance=_TOLERANCE)
    twin = _DenseLayer(dense, module.experts.activation) if isinstance(module, MoELayer) else dense
    parameter = next(module.parameters())
    return twin.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


class _DenseLayer(RoutedModule):
    """Two-layer perceptron on every token, with the call of a `moe_heads.MoELayer`."""

    def __init__(self, dense: Head, activation: Activation) -> None:
        super().__init__(dense.in_features)
        self.dense, self.activation = dense, activation

    def forward(self, x: Tensor, **_: object) -> Tensor:
        first, _act, _dropout, second = self.dense.get_submodule("layers").children()
        output: Tensor = second(ACTIVATIONS[self.activation](first(x)))
        return output

    def count_flops(self, batch: int, tokens: int) -> Flops:
        return self.dense.count_flops(batch, tokens)


def realized_ratio(dense: DrawnRounds, head: DrawnRounds, seed: int) -> tuple[float, float, float]:
    """Return the ratio of the median times over the common rounds, and the ends of its sampling interval."""
    ratio, low, high = bootstrap_draws(lambda dense, head: dense / head, [dense, head], seed)
    return ratio, max(low, 0.0), high


def break_even(sizes: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return the batch size from which on a ratio stays above one, interpolated in the logarithms of both.

    Args:
        sizes: Batch sizes, ascending.
        ratios: Ratio at each size; zero and infinity count as very small and very large.

    Returns:
        The last upward crossing if the ratio stays above one from there on, else None.

    Example:
        >>> from moe_heads.analysis.inference_timing.speedup import break_even
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
