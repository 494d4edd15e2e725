"""Limits of a device, and the least time of a call within them."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from moe_heads.analysis._shared.environment import synchronize
from moe_heads.analysis.inference_timing.flops import Operator

__all__ = ["Bound", "DeviceLimits", "dtype_of"]

Limit = Literal["arithmetic", "memory", "launches"]

# A product of this size takes a few milliseconds per core. The scheduler would interrupt a longer one in every run.
_MATRIX = {"cpu": 512, "cuda": 8192}
_SMALLEST_BYTES, _LARGEST_BYTES = 2**16, 2**28
# On a shared machine, the best of at least ten runs counts, and of as many as fit into this time.
_FEWEST_RUNS, _SECONDS = 10, 0.05


@dataclass(frozen=True)
class Bound:
    """Least time of a call, and the limit that contributes most to it.

    Attributes:
        ms: Milliseconds.
        by: The limit.
        launches_ms: Milliseconds of the launches of all operators, whatever limits each of them.
    """

    ms: float
    by: Limit
    launches_ms: float = field(default=0.0, compare=False)


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
        launches_ms = 0.0
        for flops, num_bytes, _ in operators:
            launches_ms += self.launch_ms
            times: dict[Limit, float] = {
                "arithmetic": 1e3 * flops / self.peak_flops,
                "memory": 1e3 * num_bytes / self.bandwidth(num_bytes),
                "launches": self.launch_ms,
            }
            largest = max(times, key=lambda limit: times[limit])
            sums[largest] += times[largest]
        return Bound(sum(sums.values()), max(sums, key=lambda limit: sums[limit]), launches_ms)

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


def dtype_of(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the data type of the caller's arithmetic."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
