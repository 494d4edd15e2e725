"""Result of an inference timing: its rows, metrics, markdown tables and JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.environment import Environment
from moe_heads.analysis.inference_timing.energy import PowerUse
from moe_heads.analysis.inference_timing.figures import plot_latency, plot_split, plot_throughput
from moe_heads.analysis.inference_timing.flops import CONVENTION
from moe_heads.analysis.inference_timing.gap_figure import plot_gaps
from moe_heads.analysis.inference_timing.gap_shares import gap_shares
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.requests import RequestReport
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow
from moe_heads.analysis.inference_timing.served import ServedReport
from moe_heads.analysis.inference_timing.speedup import Gap
from moe_heads.analysis.inference_timing.stages import Part
from moe_heads.analysis.inference_timing.statistics import DRIFT
from moe_heads.analysis.inference_timing.tables import (
    gap_table,
    part_tables,
    request_table,
    rows_table,
    skipped_list,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NOISY", "InferenceTimingResult"]

NOISY = 0.10
"""Relative width of the sampling interval of a median above which the machine counts as noisy."""


@dataclass(frozen=True)
class InferenceTimingResult:
    """Latency and throughput of a model and of its parts.

    Attributes:
        rows: One row per batch size, mode and module.
        environment: Processor, data type, threads, versions, and load at the start.
        warmup_runs: Largest number of warm-up runs of a module.
        seed: Seed of the order of turns.
        partial: Reason for an early end of the analysis; "" for a complete result.
        skipped: Everything that was not timed, with the reasons.
        parts: Division of the time between parts, in eager mode.
        gaps: Theoretical and realized speed of each head with a router, relative to a dense head of equal capacity.
        power: Energy and clock rates of a GPU by batch size; empty if they are unavailable.
        uncounted: Number of runs, in one pass of the model, of each operator whose arithmetic ``flops`` omits.
        peak_flops: Measured floating point operations per second of a matrix product; None if not measured.
        launch_ms: Measured milliseconds of the smallest operator.
        bandwidths: Measured bytes per second of a copy, by the bytes that it reads and writes.
        load_average_end: Load at the end; None if the system does not report it.
        drift_allowance: Allowance for drift between runs as a fraction of each median. It is a choice and not a
            statistic, and the sampling intervals do not contain it; see `TimingRow.agrees_with`.
        plan: The requested batch sizes, modes, runs, and time limits.
        requests: Entries that the forward pass got, and the shapes of all batches; None if unknown.
        served: Programs that were timed next to the model.
    """

    rows: tuple[TimingRow, ...]
    environment: Environment
    warmup_runs: int
    seed: int
    partial: str = ""
    skipped: tuple[Skipped, ...] = ()
    parts: tuple[Part, ...] = ()
    gaps: tuple[Gap, ...] = ()
    power: tuple[PowerUse, ...] = ()
    uncounted: Mapping[str, int] = field(default_factory=dict)
    peak_flops: float | None = None
    launch_ms: float | None = None
    bandwidths: Mapping[int, float] = field(default_factory=dict)
    load_average_end: float | None = None
    drift_allowance: float = DRIFT
    plan: TimingPlan | None = None
    requests: RequestReport | None = None
    served: tuple[ServedReport, ...] = ()

    @property
    def is_noisy(self) -> bool:
        """True if more than a quarter of the sampling intervals are wider than 10 % of their medians."""
        known = [row.relative_width for row in self.rows if math.isfinite(row.relative_width)]
        return 4 * sum(width > NOISY for width in known) > len(known)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log as ``<module>/batch<size>/<quantity>``, with ``/<mode>`` before it unless eager."""
        values = {
            f"{row.key}/{quantity}": getattr(row, quantity)
            for row in self.rows
            for quantity in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
        }
        for row in self.rows:
            if row.spread is not None and math.isfinite(row.spread.within_ms):
                values[f"{row.key}/between_draws_ms"] = row.spread.between_ms
                values[f"{row.key}/within_draws_ms"] = row.spread.within_ms
        for gap in self.gaps:
            mode = "" if gap.mode == "eager" else f"/{gap.mode}"
            for point in gap.points:
                values[f"{gap.head}/batch{point.batch_size}{mode}/speedup"] = point.realized
                values[f"{gap.head}/batch{point.batch_size}{mode}/theoretical_speedup"] = point.theoretical
            if gap.break_even is not None:
                values[f"{gap.head}{mode}/break_even_batch"] = gap.break_even
            for shares in gap_shares(gap, self.parts):
                key = f"{gap.head}/batch{shares.batch_size}"
                values |= {f"{key}/{part}_over_dense": share for part, share in shares.parts.items()}
                if shares.launches is not None:
                    values[f"{key}/launches_over_dense"] = shares.launches
        return values | ({"partial": 1.0} if self.partial else {})

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Plot the median latency over batch size, with bands for its interval and up to the 99th percentile.

        Args:
            ax: Axes to draw into; by default those of a new figure outside pyplot.
        """
        return plot_latency(self.rows, self.environment.device, ax)

    def plot_throughput(self) -> "Figure":
        """Plot the samples per second over batch size."""
        return plot_throughput(self.rows, self.environment.device)

    def plot_gap(self) -> "Figure | None":
        """Plot the realized and the theoretical speedup over batch size, and where the time of each head goes.

        None without a head with a router.
        """
        return plot_gaps(self.gaps, self.parts, self.environment.device) if self.gaps else None

    def plot_split(self) -> "Figure | None":
        """Plot the share of each part over batch size, for the model and each head; None without parts."""
        return plot_split(self.parts, self.environment.device) if self.parts else None

    def summary(self) -> str:
        """Return markdown with the rows, the requests, the gaps, the parts, everything skipped, and the method."""
        sections = [
            rows_table(self.rows),
            "" if self.requests is None else request_table(self.requests),
            "\n".join(f"- {program}." for program in self.served),
            *(gap_table(gap, gap_shares(gap, self.parts)) for gap in self.gaps),
            *part_tables(self.parts),
            skipped_list(self.skipped),
            self._method(),
            f"**Partial**: {self.partial}." if self.partial else "",
        ]
        return "\n\n".join(section for section in sections if section)

    def to_json(self) -> str:
        """Return the whole result as JSON; numbers that are not finite become null."""
        fields = dataclasses.asdict(self) | {
            "is_noisy": self.is_noisy,
            "flops_convention": CONVENTION,
            "interval_of_the_sampling": "p50_low_ms to p50_high_ms, low to high: 95 %, over runs in the same period",
            "allowance_for_drift_between_runs": f"{self.drift_allowance:g} of each median, in no interval; a choice",
        }
        return json.dumps(_finite(fields), indent=1, allow_nan=False) + "\n"

    def _method(self) -> str:
        runs = [row.num_runs for row in self.rows] or [0]
        end = "" if self.load_average_end is None else f" (load {self.load_average_end:.2f} at the end)"
        kind, peak = self.environment.device_type.upper(), self.peak_flops
        unstable = sum(not row.is_stable for row in self.rows)
        names = ", ".join(f"{name.removeprefix('aten.')} {times}×" for name, times in self.uncounted.items())
        sentences = (
            f"{min(runs)} to {max(runs)} runs each on a {kind}: {self.environment}{end}.",
            f"The warm-up of {unstable} of {len(self.rows)} rows ended before it was stable." if unstable else "",
            "The 95 % sampling intervals cover runs in the same period. The allowance for drift between runs is "
            f"separate: {self.drift_allowance:.0%} of each median.",
            _overhead(self.rows),
            f"**Noisy machine**: intervals of medians are wider than {NOISY:.0%}." if self.is_noisy else "",
            f"FLOPs: {CONVENTION}; ≥ marks a lower bound.",
            f"Not counted in a pass of the model: {names}." if names else "",
            "" if peak is None else f"The measured peak of a matrix product is {peak / 1e9:.4g} GFLOP/s.",
        )
        return " ".join(filter(None, sentences))


def _overhead(rows: Sequence[TimingRow]) -> str:
    """Return the largest constant cost of a timed call in words."""
    largest = max(rows, key=lambda row: row.overhead_ms, default=None)
    if largest is None or largest.overhead_ms == 0:
        return "The times contain the launches and the final synchronization." if rows else ""
    cost, error = 1e3 * largest.overhead_ms, 1e3 * largest.overhead_error_ms
    return f"The constant cost of a timed call, up to {cost:.2g} ± {error:.1g} µs, is subtracted."


def _finite(value: Any) -> Any:
    """Replace every number without a JSON equivalent by None."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
