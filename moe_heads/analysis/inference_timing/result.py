"""Result of an inference timing: its rows, metrics, markdown tables and JSON."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.environment import Environment
from moe_heads.analysis.inference_timing.energy import PowerUse
from moe_heads.analysis.inference_timing.figures import plot_gaps, plot_latency, plot_split, plot_throughput
from moe_heads.analysis.inference_timing.flops import CONVENTION
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow
from moe_heads.analysis.inference_timing.speedup import Gap, GapPoint
from moe_heads.analysis.inference_timing.stages import Part
from moe_heads.analysis.inference_timing.statistics import DRIFT

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
        for gap in self.gaps:
            mode = "" if gap.mode == "eager" else f"/{gap.mode}"
            for point in gap.points:
                values[f"{gap.head}/batch{point.batch_size}{mode}/speedup"] = point.realized
                values[f"{gap.head}/batch{point.batch_size}{mode}/theoretical_speedup"] = point.theoretical
            if gap.break_even is not None:
                values[f"{gap.head}{mode}/break_even_batch"] = gap.break_even
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
        """Plot the realized and the theoretical speedup over batch size; None without a head with a router."""
        return plot_gaps(self.gaps, self.environment.device) if self.gaps else None

    def plot_split(self) -> "Figure | None":
        """Plot the share of each part over batch size, for the model and each head; None without parts."""
        return plot_split(self.parts, self.environment.device) if self.parts else None

    def summary(self) -> str:
        """Return markdown with the rows, the gaps, the parts, everything skipped, and the method."""
        sections = [
            _rows_table(self.rows),
            *map(_gap_table, self.gaps),
            *_part_tables(self.parts),
            _skipped_list(self.skipped),
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
            f"**Noisy machine**: intervals of medians are wider than {NOISY:.0%}." if self.is_noisy else "",
            f"FLOPs: {CONVENTION}; ≥ marks a lower bound.",
            f"Not counted in a pass of the model: {names}." if names else "",
            "" if peak is None else f"The measured peak of a matrix product is {peak / 1e9:.4g} GFLOP/s.",
        )
        return " ".join(filter(None, sentences))


def _finite(value: Any) -> Any:
    """Replace every number without a JSON equivalent by None."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows_table(rows: Sequence[TimingRow]) -> str:
    """Return one line per row, without the columns that are empty throughout."""
    columns = {
        "module": [row.module for row in rows],
        "batch": [f"{row.batch_size}" for row in rows],
        "mode": [row.mode for row in rows],
        "p50 ms": [_number(row.p50_ms) for row in rows],
        "95 % sampling interval": [_interval(row.p50_low_ms, row.p50_high_ms) for row in rows],
        "p90": [_number(row.p90_ms) for row in rows],
        "p99": [_number(row.p99_ms) for row in rows],
        "max": [_number(row.max_ms) for row in rows],
        "runs": [f"{row.num_runs}" for row in rows],
        "samples/s": [f"{row.samples_per_s:,.0f}" for row in rows],
    }
    optional = {
        "device p50 ms": [_number(row.device_p50_ms) for row in rows],
        "MFLOP": [_flops(row) for row in rows],
        "of peak": ["" if row.peak_share is None else f"{row.peak_share:.1%}" for row in rows],
        "peak MiB": [_number(None if row.peak_memory is None else row.peak_memory / 2**20) for row in rows],
    }
    columns |= {name: column for name, column in optional.items() if any(column)}
    return _table(list(columns), zip(*columns.values(), strict=True))


def _gap_table(gap: Gap) -> str:
    """Return the speed ratios of a head to the dense head of equal capacity, and its break-even."""
    title = (
        f"**{gap.head} compared with a dense head of equal capacity** ({gap.mode}; {gap.parameters:,} and "
        f"{gap.dense_parameters:,} parameters): {gap.verdict()}."
    )
    heading = ("batch", "theoretical", "realized", "95 % interval", "ratio of bounds", "bound by (dense, head)")
    return f"{title}\n\n{_table(heading, map(_gap_line, gap.points))}"


def _gap_line(point: GapPoint) -> tuple[str, ...]:
    by = f"{point.dense_bound.by}, {point.head_bound.by}" if point.dense_bound and point.head_bound else ""
    ratios = _number(point.theoretical, 3), _number(point.realized, 3), _interval(point.low, point.high)
    return f"{point.batch_size}", *ratios, _number(point.bound, 3), by


def _part_tables(parts: Sequence[Part]) -> list[str]:
    """Return one table for the model and for each head, with the milliseconds of the parts."""
    tables = []
    for whole in dict.fromkeys(part.whole for part in parts):
        inside = [part for part in parts if part.whole == whole]
        names = {part.name: part.how for part in inside}
        heading = ("batch", *(name if how == "timed alone" else f"{name} ({how})" for name, how in names.items()))
        lines = []
        for size in dict.fromkeys(part.batch_size for part in inside):
            here = {part.name: part for part in inside if part.batch_size == size}
            lines.append((f"{size}", *(_part_cell(here[name]) if name in here else "" for name in names)))
        tables.append(f"**Parts of {whole}**, ms\n\n{_table(heading, lines)}")
    return tables


def _part_cell(part: Part) -> str:
    return f"{part.ms:.3g} ({_interval(part.low_ms, part.high_ms)})"


def _skipped_list(skipped: Sequence[Skipped]) -> str:
    """Return one line per mode and reason, with all modules and batch sizes that share it."""
    groups: dict[tuple[str, str], list[Skipped]] = {}
    for entry in skipped:
        groups.setdefault((entry.mode or "", entry.reason), []).append(entry)
    lines = []
    for (mode, reason), entries in groups.items():
        modules = dict.fromkeys(entry.module for entry in entries if entry.module)
        sizes = dict.fromkeys(f"{entry.batch_size}" for entry in entries if entry.batch_size)
        at = f"batch {', '.join(sizes)}" if sizes else ""
        lines.append(f"- {'; '.join(filter(None, (mode, ', '.join(modules), at)))}: {reason}")
    return "\n".join(["**Not timed**", "", *lines]) if lines else ""


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "unknown"


def _flops(row: TimingRow) -> str:
    """Return the millions of operations; "≥" marks a lower bound."""
    return "" if row.flops is None else f"{'' if row.flops_complete else '≥ '}{row.flops / 1e6:.4g}"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines))
