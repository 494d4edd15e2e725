"""The reading of the clock: wall time between two synchronizations, and device time between two events."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_heads.analysis._shared.environment import synchronize

__all__ = ["Clock", "Sample"]

# more than the last cache of a large server processor, or of any GPU
_FLUSH_BYTES = 256 * 2**20


class Sample(NamedTuple):
    """One run: milliseconds on the wall, and on the stream of a CUDA device (nan elsewhere)."""

    wall_ms: float
    device_ms: float


class Clock:
    """Times single calls on one device.

    On a CUDA device the wall time includes the launches and the last synchronization; the device time does not, and is
    below it where the host is slower than the device.

    Args:
        device: Where the calls do their work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def time(self, call: Callable[[], object]) -> Sample:
        """Run the call once."""
        synchronize(self.device)
        if not self._events:
            start = time.perf_counter_ns()
            call()
            synchronize(self.device)
            return Sample(_ms_since(start), float("nan"))
        first, last = self._events
        start = time.perf_counter_ns()
        first.record()
        call()
        last.record()
        synchronize(self.device)
        return Sample(_ms_since(start), first.elapsed_time(last))

    def cool(self) -> None:
        """Fill the caches with something else."""
        if self._flush is None:
            self._flush = torch.zeros(_FLUSH_BYTES // 4, device=self.device)
        self._flush.add_(1)


def _ms_since(start: int) -> float:
    """Milliseconds since a reading; never zero, whatever the resolution of the clock."""
    return max(time.perf_counter_ns() - start, 1) / 1e6
