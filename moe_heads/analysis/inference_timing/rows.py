"""Rows of an inference timing: the statistics of one call, or the reason why it was not timed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_heads.analysis.inference_timing.calls import RowKey, RowMode
from moe_heads.analysis.inference_timing.draws import DrawSpread, interval_of, median_of, quantiles_of, spread_of
from moe_heads.analysis.inference_timing.flops import FlopCount
from moe_heads.analysis.inference_timing.measure import TimedCall
from moe_heads.analysis.inference_timing.statistics import DRIFT

__all__ = ["Skipped", "TimingRow", "row_of"]


@dataclass(frozen=True)
class TimingRow:
    """Wall times of one module at one batch size, with the device synchronized before each reading of the clock.

    Attributes:
        batch_size: Samples of a batch.
        mode: Execution mode.
        module: "model" for the whole forward pass, else the module's dotted name.
        p50_ms: Median, milliseconds; for several draws of the batch the median over their medians. The other
            percentiles include every run, with the same weight for each draw.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; with fewer than 100 runs it lies between the two slowest.
        mean_ms: Mean.
        std_ms: Standard deviation of the runs (nan for a single run).
        num_runs: Number of timed runs.
        samples_per_s: Samples per second over all runs, ``batch_size / mean``.
        max_ms: Slowest run.
        p50_low_ms: Lower end of the 95 % sampling interval of the median, which accounts for dependent runs. It covers
            other runs of the same batches in the same period, but not drift between periods, see
            `InferenceTimingResult.drift_allowance`.
        p50_high_ms: Upper end; infinite with fewer than six runs.
        device_p50_ms: Median time between two events on the stream of a CUDA device; None elsewhere.
        warmup_runs: Runs before the timed ones.
        is_stable: Whether the warm-up reached its tolerance.
        flops: Floating point operations of a run, two per multiply-add; only the chosen experts of a sparse head.
        flops_complete: False for a lower bound: an operator ran whose products have no known formula.
        peak_share: Operations per second relative to the measured peak of a matrix product in the model's data type
            (bf16 for "bf16"); None if either is unknown.
        peak_memory: Largest number of bytes allocated on the CUDA device during a run; None elsewhere.
        overhead_ms: Constant cost of a run, measured with a function that does nothing and subtracted from all times.
            It is zero on a GPU, where the last synchronization is a part of the time.
        overhead_error_ms: Half the width of its 95 % interval, by which the interval of the median is extended.
        spread: Spread of the time over the draws of the batch; None for a single draw.
    """

    batch_size: int
    mode: RowMode
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
    overhead_ms: float = 0.0
    overhead_error_ms: float = 0.0
    spread: DrawSpread | None = None

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
    mode: RowMode | None
    module: str | None
    reason: str

    def __str__(self) -> str:
        parts = [f"batch {self.batch_size}" if self.batch_size else "", self.mode or "", self.module or ""]
        return f"{', '.join(filter(None, parts))}: {self.reason}"


def row_of(
    size: int,
    key: RowKey,
    calls: Sequence[TimedCall],
    flops: Sequence[FlopCount | None],
    peak_flops: float | None,
    seed: int = 0,
) -> TimingRow:
    """Return the row of a call that was timed on several draws of a batch.

    Args:
        size: Samples of a batch.
        key: Module and mode.
        calls: The call on each draw.
        flops: Its operations per run on each draw; None if they are unknown.
        peak_flops: Peak operations per second of the device; None if unknown.
        seed: Seed of the bootstrap.
    """
    draws = [call.wall_ms() for call in calls]
    times = [np.concatenate(rounds) for rounds in draws]
    counts = [count for count in flops if count is not None]
    mean = float(np.mean([np.mean(part) for part in times]))
    p50, (low, high) = median_of(draws), interval_of(draws, seed)
    p90, p99 = quantiles_of(draws, [0.9, 0.99])
    overhead = max((call.overhead for call in calls), key=lambda found: found.error_ms)
    num_runs, device = sum(map(len, times)), _device_median(calls)
    peak_memory = [call.peak_memory for call in calls if call.peak_memory is not None]
    return TimingRow(
        batch_size=size,
        mode=key.mode,
        module=key.module,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=mean,
        std_ms=_deviation(times) if num_runs > 1 else float("nan"),
        num_runs=num_runs,
        samples_per_s=1000 * size / mean,
        max_ms=float(max(part.max() for part in times)),
        p50_low_ms=max(low - overhead.error_ms, 0.0),
        p50_high_ms=high + overhead.error_ms,
        device_p50_ms=device,
        warmup_runs=max(call.warmup_runs for call in calls),
        is_stable=all(call.is_stable for call in calls),
        flops=round(float(np.mean([count.value for count in counts]))) if counts else None,
        flops_complete=all(count.is_complete for count in counts),
        peak_share=_peak_share(times, counts, peak_flops),
        peak_memory=max(peak_memory, default=None),
        overhead_ms=overhead.ms,
        overhead_error_ms=overhead.error_ms,
        spread=spread_of(draws, seed),
    )


def _deviation(times: Sequence[NDArray[np.float64]]) -> float:
    """Return the standard deviation over all runs, in which each draw has the same weight."""
    if len(times) == 1:
        return float(np.std(times[0], ddof=1))
    means = [np.mean(part) for part in times]
    return float(np.sqrt(np.mean([np.var(part) for part in times]) + np.var(means)))


def _device_median(calls: Sequence[TimedCall]) -> float | None:
    device = [[reading.device_ms for turn in call.rounds for reading in turn] for call in calls]
    medians = [np.median(part) for part in device]
    return None if np.isnan(medians).any() else float(np.median(medians))


def _peak_share(
    times: Sequence[NDArray[np.float64]], counts: Sequence[FlopCount], peak_flops: float | None
) -> float | None:
    if peak_flops is None or len(counts) < len(times) or not all(count.is_complete for count in counts):
        return None
    shares = [1e3 * count.value / (np.median(part) * peak_flops) for part, count in zip(times, counts, strict=True)]
    return float(np.median(shares))
