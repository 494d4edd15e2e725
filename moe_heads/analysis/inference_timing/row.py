"""One row of an inference timing."""

import statistics
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moe_heads.analysis.inference_timing.intervals import DRIFT, median_interval
from moe_heads.analysis.inference_timing.rounds import Cache, Contender

__all__ = ["Flops", "Key", "Skipped", "TimingMode", "TimingRow", "row_of"]

TimingMode = Literal["eager", "compiled", "cuda_graph", "bf16", "channels_last"]
"""How a model runs: as Python calls it, by torch.compile, as a CUDA graph, under bf16 autocast, in channels_last."""


class Key(NamedTuple):
    """What takes its turn at one batch size."""

    module: str
    mode: TimingMode = "eager"
    cache: Cache = "warm"


@dataclass(frozen=True)
class TimingRow:
    """Wall times of one module at one batch size, synchronized with the device before each reading of the clock.

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
        max_ms: Slowest run.
        p50_low_ms: Lower end of the 95 % interval of the sampling, see `median_interval`: what other runs in the same
            while would give. Drift between two runs is not in it, see `InferenceTimingResult.drift_allowance`.
        p50_high_ms: Upper end; infinite with fewer than six runs.
        device_p50_ms: Median time between two events on the stream of a CUDA device; None elsewhere.
        cache: "warm" or "cold".
        warmup_runs: Runs before the timed ones.
        is_stable: Whether the warm-up reached its tolerance.
        flops: Floating point operations of a run, two a multiply-add; for a sparse head those of the chosen experts.
        flops_complete: False where they are a lower bound: an operator ran whose products no formula is known for.
        peak_share: Arithmetic a second, as a share of the measured peak of a matrix product in fp32 (of bf16 for
            "bf16"); None where either is not known.
        peak_memory: Most bytes allocated on the CUDA device during a run; None elsewhere.
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
    cache: Cache = "warm"
    warmup_runs: int = 0
    is_stable: bool = True
    flops: int | None = None
    flops_complete: bool = True
    peak_share: float | None = None
    peak_memory: int | None = None

    @property
    def key(self) -> str:
        """First part of the names of its numbers: ``<module>/batch<size>``, then mode and cache unless eager, warm."""
        parts = [self.module, f"batch{self.batch_size}"]
        parts += [self.mode] if self.mode != "eager" else []
        return "/".join([*parts, "cold"] if self.cache == "cold" else parts)

    @property
    def relative_width(self) -> float:
        """Width of the interval of the median as a share of the median; infinite with fewer than six runs."""
        return (self.p50_high_ms - self.p50_low_ms) / self.p50_ms

    def agrees_with(self, other: "TimingRow", drift_allowance: float = DRIFT) -> bool:
        """Whether two medians differ by no more than their intervals and the allowance for drift between two runs.

        Args:
            other: The row of another run.
            drift_allowance: Share of each median by which its interval is stretched at both ends.
        """
        return all(
            a.p50_low_ms - drift_allowance * a.p50_ms <= b.p50_high_ms + drift_allowance * b.p50_ms
            for a, b in ((self, other), (other, self))
        )


@dataclass(frozen=True)
class Skipped:
    """What was not timed.

    Attributes:
        batch_size: Samples of the batch; None for all sizes.
        mode: The mode; None for all modes.
        module: The module; None for all of them.
        reason: Why.
    """

    batch_size: int | None
    mode: TimingMode | None
    module: str | None
    reason: str

    def __str__(self) -> str:
        what = [f"batch {self.batch_size}" if self.batch_size else "", self.mode or "", self.module or ""]
        return f"{', '.join(filter(None, what))}: {self.reason}"


class Flops(NamedTuple):
    """Floating point operations.

    Attributes:
        value: How many.
        is_complete: Whether it is all of them, or a lower bound.
    """

    value: int
    is_complete: bool = True


def row_of(size: int, key: Key, contender: Contender, flops: Flops | None, peak_flops: float | None) -> TimingRow:
    """The row of what was timed.

    Args:
        size: Samples of the batch.
        key: What it is.
        contender: Its times.
        flops: Floating point operations of a run.
        peak_flops: Those that the device can do in a second.
    """
    rounds = contender.wall_ms()
    times = [time for found in rounds for time in found]
    p50, p90, p99 = np.quantile(times, [0.5, 0.9, 0.99]).tolist()
    mean, (low, high) = statistics.fmean(times), median_interval(rounds)
    device = [sample.device_ms for found in contender.rounds for sample in found]
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
        cache=key.cache,
        warmup_runs=contender.warmup_runs,
        is_stable=contender.is_stable,
        flops=None if flops is None else flops.value,
        flops_complete=flops is None or flops.is_complete,
        peak_share=share,
        peak_memory=contender.peak_memory,
    )
