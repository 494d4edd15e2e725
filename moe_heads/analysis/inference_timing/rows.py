"""Rows of an inference timing: the statistics of one call, or the reason why it was not timed."""

import statistics
from dataclasses import dataclass

import numpy as np

from moe_heads.analysis.inference_timing.calls import RowKey, TimingMode
from moe_heads.analysis.inference_timing.flops import FlopCount
from moe_heads.analysis.inference_timing.measure import TimedCall
from moe_heads.analysis.inference_timing.statistics import DRIFT, median_interval

__all__ = ["Skipped", "TimingRow", "row_of"]


@dataclass(frozen=True)
class TimingRow:
    """Wall times of one module at one batch size, with the device synchronized before each reading of the clock.

    Attributes:
        batch_size: Samples of a batch.
        mode: Execution mode.
        module: "model" for the whole forward pass, else the module's dotted name.
        p50_ms: Median, milliseconds. Percentiles include every run, with linear interpolation.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; with fewer than 100 runs it lies between the two slowest.
        mean_ms: Mean.
        std_ms: Standard deviation of the runs (nan for a single run).
        num_runs: Number of timed runs.
        samples_per_s: Samples per second over all runs, ``batch_size / mean``.
        max_ms: Slowest run.
        p50_low_ms: Lower end of the 95 % sampling interval of the median, which accounts for dependent runs. It covers
            other runs in the same period, but not drift between periods, see `InferenceTimingResult.drift_allowance`.
        p50_high_ms: Upper end; infinite with fewer than six runs.
        device_p50_ms: Median time between two events on the stream of a CUDA device; None elsewhere.
        warmup_runs: Runs before the timed ones.
        is_stable: Whether the warm-up reached its tolerance.
        flops: Floating point operations of a run, two per multiply-add; only the chosen experts of a sparse head.
        flops_complete: False for a lower bound: an operator ran whose products have no known formula.
        peak_share: Operations per second relative to the measured peak of a matrix product in the model's data type
            (bf16 for "bf16"); None if either is unknown.
        peak_memory: Largest number of bytes allocated on the CUDA device during a run; None elsewhere.
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
    max_ms: float = float("nan")
    p50_low_ms: float = 0.0
    p50_high_ms: float = float("inf")
    device_p50_ms: float | None = None
    warmup_runs: int = 0
    is_stable: bool = True
    flops: int | None = None
    flops_complete: bool = True
    peak_share: float | None = None
    peak_memory: int | None = None

    @property
    def key(self) -> str:
        """First part of its metric names: ``<module>/batch<size>``, then the mode unless eager."""
        return "/".join([self.module, f"batch{self.batch_size}", *([] if self.mode == "eager" else [self.mode])])

    @property
    def relative_width(self) -> float:
        """Width of the interval of the median relative to the median; infinite with fewer than six runs."""
        return (self.p50_high_ms - self.p50_low_ms) / self.p50_ms

    def agrees_with(self, other: "TimingRow", drift_allowance: float = DRIFT) -> bool:
        """Return whether two medians agree within their intervals and the allowance for drift between runs.

        Args:
            other: The row of another run.
            drift_allowance: Fraction of each median by which both ends of its interval are extended.
        """
        return all(
            a.p50_low_ms - drift_allowance * a.p50_ms <= b.p50_high_ms + drift_allowance * b.p50_ms
            for a, b in ((self, other), (other, self))
        )


@dataclass(frozen=True)
class Skipped:
    """A batch size, mode and module that was not timed (None for all of them), with the reason."""

    batch_size: int | None
    mode: TimingMode | None
    module: str | None
    reason: str

    def __str__(self) -> str:
        parts = [f"batch {self.batch_size}" if self.batch_size else "", self.mode or "", self.module or ""]
        return f"{', '.join(filter(None, parts))}: {self.reason}"


def row_of(size: int, key: RowKey, call: TimedCall, flops: FlopCount | None, peak_flops: float | None) -> TimingRow:
    """Return the row of a timed call, given its operations per run and the peak operations per second of the device."""
    rounds = call.wall_ms()
    times = [ms for in_round in rounds for ms in in_round]
    p50, p90, p99 = np.quantile(times, [0.5, 0.9, 0.99]).tolist()
    mean, (low, high) = statistics.fmean(times), median_interval(rounds)
    device = [reading.device_ms for readings in call.rounds for reading in readings]
    share = None
    if flops is not None and flops.is_complete and peak_flops is not None:
        share = 1e3 * flops.value / (p50 * peak_flops)
    return TimingRow(
        batch_size=size,
        mode=key.mode,
        module=key.module,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=mean,
        std_ms=statistics.stdev(times) if len(times) > 1 else float("nan"),
        num_runs=len(times),
        samples_per_s=1000 * size / mean,
        max_ms=max(times),
        p50_low_ms=low,
        p50_high_ms=high,
        device_p50_ms=None if np.isnan(device).any() else float(np.median(device)),
        warmup_runs=call.warmup_runs,
        is_stable=call.is_stable,
        flops=None if flops is None else flops.value,
        flops_complete=flops is None or flops.is_complete,
        peak_share=share,
        peak_memory=call.peak_memory,
    )
