"""Theoretical and realized speed of a head against a dense head of equal capacity, and roofline bounds of both."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.environment import synchronize
from moe_heads.analysis.inference_timing.calls import RowMode
from moe_heads.analysis.inference_timing.draws import DrawnRounds, bootstrap_draws
from moe_heads.analysis.inference_timing.flops import Operator
from moe_heads.analysis.inference_timing.statistics import DRIFT
from moe_heads.capacity import capacity, match_capacity
from moe_heads.experts import ACTIVATIONS, Activation
from moe_heads.flops import Flops
from moe_heads.head import Head
from moe_heads.moe_layer import MoELayer
from moe_heads.routed_module import RoutedModule

__all__ = ["Bound", "DeviceLimits", "Gap", "GapPoint", "break_even", "dense_twin", "gap_of", "realized_ratio"]

Limit = Literal["arithmetic", "memory", "launches"]
Standing = Literal["faster", "slower", "undecided"]

# as in the study: small heads have few units, and one unit more is a few percent
_TOLERANCE = 0.05
_EXTREME = 1e9
_PHRASES: Mapping[Standing, str] = {
    "faster": "faster than the dense head",
    "slower": "slower than the dense head",
    "undecided": "not distinguishable from the dense head",
}

# A product of this size takes a few milliseconds per core. The scheduler would interrupt a longer one in every run.
_MATRIX = {"cpu": 512, "cuda": 8192}
_SMALLEST_BYTES, _LARGEST_BYTES = 2**16, 2**28
# On a shared machine, the best of at least ten runs counts, and of as many as fit into this time.
_FEWEST_RUNS, _SECONDS = 10, 0.05


@dataclass(frozen=True)
class Bound:
    """Least time of a call in milliseconds, and the limit that contributes most to it."""

    ms: float
    by: Limit


class DeviceLimits:
    """Limits of a device, each measured on first use as the best of several runs.

    Args:
        device: The device.
        dtype: Data type of the matrix product.

    Attributes:
        bandwidths: Bytes per second, read and written, of a copy, by its total bytes in powers of two: a copy that fits
            into a cache is faster than memory.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.bandwidths: dict[int, float] = {}

    @cached_property
    def peak_flops(self) -> float:
        """Floating point operations per second of a square matrix product: size 512 on a small CPU, 8192 on a GPU."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        size = int(_MATRIX[self.device.type] * max(threads / 2, 1) ** (1 / 3))
        a = torch.ones(size, size, device=self.device, dtype=self.dtype)
        return 2e3 * size**3 / self._best_ms(lambda: a @ a)

    @cached_property
    def launch_ms(self) -> float:
        """Milliseconds of the smallest operator in eager mode."""
        one = torch.zeros(1, device=self.device)
        return self._best_ms(lambda: [one.add_(1) for _ in range(10)]) / 10

    def bandwidth(self, num_bytes: int) -> float:
        """Return the bytes per second of a copy whose source and target together have ``num_bytes``."""
        size = min(max(1 << (max(num_bytes, 1) - 1).bit_length(), _SMALLEST_BYTES), _LARGEST_BYTES)
        if size not in self.bandwidths:
            source = torch.zeros(size // 8, device=self.device)
            target = torch.empty_like(source)
            self.bandwidths[size] = 1e3 * size / self._best_ms(lambda: target.copy_(source))
        return self.bandwidths[size]

    def bound(self, operators: Iterable[Operator]) -> Bound:
        """Return the least time of consecutive operators, each max(arithmetic / peak, bytes / bandwidth, launch)."""
        sums: dict[Limit, float] = {"arithmetic": 0.0, "memory": 0.0, "launches": 0.0}
        for flops, num_bytes, _ in operators:
            times: dict[Limit, float] = {
                "arithmetic": 1e3 * flops / self.peak_flops,
                "memory": 1e3 * num_bytes / self.bandwidth(num_bytes),
                "launches": self.launch_ms,
            }
            largest = max(times, key=lambda limit: times[limit])
            sums[largest] += times[largest]
        return Bound(sum(sums.values()), max(sums, key=lambda limit: sums[limit]))

    def _best_ms(self, function: Callable[[], object]) -> float:
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) <= _FEWEST_RUNS or time.perf_counter() - begin < _SECONDS:
            synchronize(self.device)
            start = time.perf_counter_ns()
            function()
            synchronize(self.device)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return max(min(times[1:]), 1e-6)


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

    def verdict(self) -> str:
        """Return in words at which batch sizes the head is significantly faster than the dense head."""
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
