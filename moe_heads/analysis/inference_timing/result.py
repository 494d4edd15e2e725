"""What an inference timing found, and how it is reported."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.environment import Environment
from moe_heads.analysis.inference_timing.counting import CONVENTION
from moe_heads.analysis.inference_timing.gap import Gap
from moe_heads.analysis.inference_timing.intervals import DRIFT
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.power import PowerUse
from moe_heads.analysis.inference_timing.row import Skipped, TimingRow
from moe_heads.analysis.inference_timing.split import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NOISY", "InferenceTimingResult"]

NOISY = 0.10
"""Width of the interval of the sampling of a median, as a share of it, above which the machine is called noisy."""


@dataclass(frozen=True)
class InferenceTimingResult:
    """Latency and throughput of a model and of parts of it.

    Attributes:
        rows: One for each batch size, mode and module.
        environment: Processor, data type, threads, versions, load at the start.
        warmup_runs: Most runs before the timed ones that a module took.
        seed: Seed of the order in which the modules took turns.
        partial: Why the analysis ended before its time; "" for one that is whole.
        skipped: What was not timed, and why.
        parts: Where the time goes, in eager mode.
        gaps: Theoretical and realized speed of each head with a router, beside a dense head of equal capacity.
        power: Energy and clocks of a GPU by batch size; empty where they cannot be read.
        uncounted: How often each operator whose arithmetic ``flops`` leaves out ran in one pass of the model.
        peak_flops: Floating point operations a second of a matrix product, measured; None where it was not.
        launch_ms: Milliseconds of the smallest operator, measured.
        bandwidths: Bytes a second of a copy by the bytes that it reads and writes, measured.
        load_average_end: Load at the end; None where the system does not tell.
        drift_allowance: For drift between two runs, as a share of each median: beside the intervals of the sampling,
            which do not contain it. No statistic, but a choice; see `TimingRow.agrees_with`.
        plan: What was asked for: batch sizes, modes, caches, runs, and time.
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

    @property
    def is_noisy(self) -> bool:
        """Whether the interval of the sampling is wider than 10 % for more than a quarter of the rows that have one."""
        known = [row.relative_width for row in self.rows if math.isfinite(row.relative_width)]
        return 4 * sum(width > NOISY for width in known) > len(known)

    def metrics(self) -> dict[str, float]:
        """The numbers to log, ``<module>/batch<size>/<quantity>``; ``/<mode>`` before it unless eager."""
        values = {
            f"{row.key}/{quantity}": getattr(row, quantity)
            for row in self.rows
            for quantity in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
        }
        for gap in self.gaps:
            mode = "" if gap.mode == "eager" else f"/{gap.mode}"
            for point in gap.points:
                values[f"{gap.head}/batch{point.batch_size}{mode}/speedup"] = point.realized
                values[f"{gap.head}/batch{point.batch_size}{mode}/theoretical_speedup"] = point.theoretical
            if gap.break_even is not None:
                values[f"{gap.head}{mode}/break_even_batch"] = gap.break_even
        return values | ({"partial": 1.0} if self.partial else {})

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Median latency over batch size with bands: the interval of the median, and up to the 99th percentile.

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        from moe_heads.analysis.inference_timing.figures import plot_latency

        return plot_latency(self.rows, self.environment.device, ax)

    def plot_throughput(self) -> "Figure":
        """Samples a second over batch size."""
        from moe_heads.analysis.inference_timing.figures import plot_throughput

        return plot_throughput(self.rows, self.environment.device)[0]

    def plot_gap(self) -> "Figure | None":
        """Realized against theoretical ratio over batch size; None where there is no head with a router."""
        from moe_heads.analysis.inference_timing.figure_gap import plot_gaps

        return plot_gaps(self.gaps, self.environment.device) if self.gaps else None

    def plot_split(self) -> "Figure | None":
        """Share of each part over batch size, of the model and of each head; None where there are no parts."""
        from moe_heads.analysis.inference_timing.figure_split import plot_split

        return plot_split(self.parts, self.environment.device) if self.parts else None

    def summary(self) -> str:
        """Markdown: the rows, the gaps, the split, what was left out, and how it was measured."""
        from moe_heads.analysis.inference_timing.tables import gap_tables, rows_table, skipped_list, split_tables

        sections = [
            rows_table(self.rows),
            *gap_tables(self.gaps),
            *split_tables(self.parts),
            skipped_list(self.skipped),
            self._how(),
            f"**Partial**: {self.partial}." if self.partial else "",
        ]
        return "\n\n".join(section for section in sections if section)

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite become null."""
        found = dataclasses.asdict(self) | {
            "is_noisy": self.is_noisy,
            "flops_convention": CONVENTION,
            "interval_of_the_sampling": "p50_low_ms to p50_high_ms, low to high: 95 %, of other runs in the same while",
            "allowance_for_drift_between_runs": f"{self.drift_allowance:g} of each median, in no interval; a choice",
        }
        return json.dumps(_finite(found), indent=1, allow_nan=False) + "\n"

    def _how(self) -> str:
        runs = [row.num_runs for row in self.rows] or [0]
        end = "" if self.load_average_end is None else f" (load {self.load_average_end:.2f} at the end)"
        kind = self.environment.device_type.upper()
        sentences = [f"{min(runs)} to {max(runs)} runs each on a {kind}: {self.environment}{end}."]
        unstable = sum(not row.is_stable for row in self.rows)
        if unstable:
            sentences.append(f"The warm-up of {unstable} of {len(self.rows)} rows ended before it was stable.")
        sentences.append(
            "Intervals are those of the sampling, 95 %: of other runs in the same while. Allowance for drift between "
            f"runs, apart from them: {self.drift_allowance:.0%} of each median."
        )
        if self.is_noisy:
            sentences.append(f"**Noisy machine**: intervals of medians are wider than {NOISY:.0%}.")
        sentences.append(f"FLOPs: {CONVENTION}; ≥ marks a lower bound.")
        if self.uncounted:
            names = ", ".join(f"{name.removeprefix('aten.')} {times}×" for name, times in self.uncounted.items())
            sentences.append(f"Not counted in a pass of the model: {names}.")
        if self.peak_flops is not None:
            sentences.append(f"Peak is that of a matrix product measured here, {self.peak_flops / 1e9:.4g} GFLOP/s.")
        return " ".join(sentences)


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
