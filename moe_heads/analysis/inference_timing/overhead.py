"""Constant cost of a timed call: the clock and the call itself, measured with a function that does nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.entries import call_request
from moe_heads.analysis.inference_timing.statistics import median_interval

__all__ = ["Overhead", "null_of", "overhead_of"]


class Overhead(NamedTuple):
    """Constant cost of a timed call, and half the width of the 95 % interval of its median, milliseconds."""

    ms: float
    error_ms: float


def null_of(function: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Return a function with all the work of a timed call around the one that is timed.

    Returns None on other devices than a CPU. There the cost is that of the last synchronization, which overlaps with
    the work, so that it cannot be subtracted.
    """
    if device.type != "cpu":
        return None
    if not isinstance(function, Call):
        return _nothing
    if function.function is not call_request:
        return replace(function, function=_nothing, overwritten={})
    return replace(function, arguments=tuple(((_nothing, *args[1:]), kwargs) for args, kwargs in function.arguments))


def overhead_of(times: Sequence[float]) -> Overhead:
    """Return the constant cost from the times of the null function, one per round; zero without any."""
    if not times:
        return Overhead(0.0, 0.0)
    median = float(np.median(times))
    low, high = median_interval([[ms] for ms in times])
    return Overhead(median, max(median - low, high - median))


def _nothing(*args: object, **kwargs: object) -> None:
    """Do nothing."""
