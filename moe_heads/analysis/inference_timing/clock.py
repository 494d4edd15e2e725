"""Clock for single runs on one device."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_heads.analysis._shared.environment import synchronize

__all__ = ["Clock", "Reading"]


class Reading(NamedTuple):
    """Duration of one run: milliseconds of wall time, and of time on the stream of a CUDA device (else nan)."""

    wall_ms: float
    device_ms: float


class Clock:
    """Clock for single runs on one device.

    On a CUDA device, the wall time includes the launches and the final synchronization. The device time between two
    events does not, and is shorter where the host is slower than the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def time(self, function: Callable[[], object]) -> Reading:
        """Run the function once between two synchronizations."""
        if self.device.type == "cpu":
            # without the calls that do nothing here
            start = time.perf_counter_ns()
            function()
            return Reading(max(time.perf_counter_ns() - start, 1) / 1e6, float("nan"))
        first, last = self._events or (None, None)
        synchronize(self.device)
        start = time.perf_counter_ns()
        if first is not None:
            first.record()
        function()
        if last is not None:
            last.record()
        synchronize(self.device)
        # never zero, whatever the resolution of the clock
        wall_ms = max(time.perf_counter_ns() - start, 1) / 1e6
        return Reading(wall_ms, float("nan") if first is None or last is None else first.elapsed_time(last))
