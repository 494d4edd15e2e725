"""One row of an inference timing."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["TimingMode", "TimingRow"]

TimingMode = Literal["eager"]
"""How the model runs: "eager", as Python calls it."""


@dataclass(frozen=True)
class TimingRow:
    """Wall times of one module at one batch size, synchronised with the device before each reading of the clock.

    Attributes:
        batch_size: Samples of a batch.
        mode: How the model ran.
        module: "model" for the whole forward pass, else the module's dotted name.
        p50_ms: Median, milliseconds. Percentiles are interpolated linearly between the runs; none is left out.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; with fewer than 100 runs it lies between the two slowest.
        mean_ms: Mean.
        std_ms: Standard deviation of the runs (nan for a single run).
        num_runs: Runs timed.
        samples_per_s: Samples a second over all runs, ``batch_size / mean``.
    """

    batch_size: int
    mode: TimingMode
    module: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    num_runs: int
    samples_per_s: float
