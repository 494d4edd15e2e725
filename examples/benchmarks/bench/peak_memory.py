"""Peak memory during a function call."""

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory", "with_peak_resident"]

T = TypeVar("T")


def peak_memory(function: Callable[[], object]) -> int:
    """Return the peak number of bytes of torch on the CPU above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    held, peak = 0, 0
    results = profiler.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def with_peak_resident(function: Callable[[], T]) -> tuple[T, float]:
    """Return the result, and the peak of the process's memory above the start in bytes; nan where Linux is missing.

    Unlike `peak_memory` it includes numpy, and costs no time.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    value = function()
    return value, _status("VmHWM") - before


def _status(name: str) -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(name)), math.nan)
