"""What this device can do at most, measured, and the time that it needs at least for what a head runs in eager mode."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from moe_heads.analysis._shared.environment import synchronize
from moe_heads.analysis.inference_timing.counting import Operator

__all__ = ["Bound", "Limit", "Limits"]

Limit = Literal["arithmetic", "memory", "launches"]

# A few milliseconds a core: what takes longer than a slice of the processor's time is interrupted in every run.
_MATRIX = {"cpu": 512, "cuda": 8192}
_SMALLEST_BYTES, _LARGEST_BYTES = 2**16, 2**28
# Others may use the machine: the best of at least ten runs, and of as many as there are in this time.
_FEWEST_RUNS, _SECONDS = 10, 0.05


@dataclass(frozen=True)
class Bound:
    """Least time of a call.

    Attributes:
        ms: Milliseconds.
        by: What most of them are due to.
    """

    ms: float
    by: Limit


@dataclass
class Limits:
    """Limits of a device, each measured when it is first asked for, as the best of a few runs.

    Args:
        device: The device.
        dtype: Data type of the matrix product.

    Attributes:
        bandwidths: Bytes a second, read and written, of a copy with so many bytes in all, by powers of two: what fits
            a cache is faster than memory.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    bandwidths: dict[int, float] = field(default_factory=dict)
    _peak: float | None = None
    _launch: float | None = None

    @property
    def peak_flops(self) -> float:
        """Floating point operations a second of a square matrix product: 512 on a CPU of few cores, 8192 on a GPU."""
        if self._peak is None:
            threads = torch.get_num_threads() if self.device.type == "cpu" else 1
            size = int(_MATRIX[self.device.type] * max(threads / 2, 1) ** (1 / 3))
            a = torch.ones(size, size, device=self.device, dtype=self.dtype)
            self._peak = 2e3 * size**3 / self._best_ms(lambda: a @ a)
        return self._peak

    @property
    def launch_ms(self) -> float:
        """Milliseconds of the smallest operator in eager mode."""
        if self._launch is None:
            one = torch.zeros(1, device=self.device)
            self._launch = self._best_ms(lambda: [one.add_(1) for _ in range(10)]) / 10
        return self._launch

    def bandwidth(self, num_bytes: int) -> float:
        """Bytes a second of a copy whose source and target are as large as ``num_bytes`` together."""
        size = min(max(1 << (max(num_bytes, 1) - 1).bit_length(), _SMALLEST_BYTES), _LARGEST_BYTES)
        if size not in self.bandwidths:
            source = torch.zeros(size // 8, device=self.device)
            target = torch.empty_like(source)
            self.bandwidths[size] = 1e3 * size / self._best_ms(lambda: target.copy_(source))
        return self.bandwidths[size]

    def bound(self, operators: Iterable[Operator]) -> Bound:
        """Least time of operators one after the other, each max(arithmetic / peak, bytes / bandwidth, launch).

        Args:
            operators: What runs.
        """
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

    def _best_ms(self, call: Callable[[], object]) -> float:
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) <= _FEWEST_RUNS or time.perf_counter() - begin < _SECONDS:
            synchronize(self.device)
            start = time.perf_counter_ns()
            call()
            synchronize(self.device)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return max(min(times[1:]), 1e-6)
