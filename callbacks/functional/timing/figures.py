"""Figures over batch size: latency, throughput, and the gap between theoretical and realised speed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_heads.callbacks.functional.common.figures import axes_of
from moe_heads.callbacks.functional.timing.calls import MODEL
from moe_heads.callbacks.functional.timing.gap import Gap
from moe_heads.callbacks.functional.timing.heads import STAGES, part_name
from moe_heads.callbacks.functional.timing.row import TimingRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FONT", "SIZE", "plot_gaps", "plot_latency", "plot_throughput", "short_name"]

# TensorBoard shows a figure about 450 pixels wide: at this size its letters stay readable.
SIZE = (4.8, 3.6)
FONT = 8
_DASHES: dict[str, Any] = {
    "eager": "-",
    "compiled": "--",
    "cuda_graph": ":",
    "bf16": "-.",
    "channels_last": (0, (1, 1, 3, 1)),
}


def plot_latency(rows: Sequence[TimingRow], device: str, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Median latency over batch size: dark bands are intervals of the median, light ones reach p99."""
    figure, ax = axes_of(ax, SIZE)
    for line in _lines(rows):
        line.draw(ax, lambda row, ms: ms)
        top = [row.p99_ms for row in line.rows]
        ax.fill_between(line.sizes, [row.p50_ms for row in line.rows], top, color=line.color, alpha=0.12, linewidth=0)
    ax.set(yscale="log", ylabel="latency (ms): median, its interval, up to p99")
    _finish(ax, [row.batch_size for row in rows], device)
    return figure, ax


def plot_throughput(rows: Sequence[TimingRow], device: str) -> "tuple[Figure, Axes]":
    """Samples a second over batch size, at the median latency and the ends of its interval."""
    figure, ax = axes_of(None, SIZE)
    for line in _lines(rows):
        line.draw(ax, lambda row, ms: 1e3 * row.batch_size / ms)
    ax.set(yscale="log", ylabel="samples a second, at the median")
    _finish(ax, [row.batch_size for row in rows], device)
    return figure, ax


def plot_gaps(gaps: Sequence[Gap], device: str) -> "Figure":
    """Ratio of the dense head's time to that of the head, over batch size: realised, theoretical, and as bounded."""
    figure, ax = axes_of(None, SIZE)
    for index, gap in enumerate(gaps):
        color, sizes = f"C{index}", [point.batch_size for point in gap.points]
        realised = [point.realised for point in gap.points]
        ax.plot(sizes, realised, marker="o", markersize=3, color=color, label=f"{gap.head}, {gap.mode}")
        low, high = _ends([(point.low, point.high, point.realised) for point in gap.points])
        ax.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)
        if gap.mode == "eager":
            ax.plot(sizes, [point.theoretical for point in gap.points], "--", color=color, label="theoretical (FLOPs)")
            bounds = [math.nan if point.bound is None else point.bound for point in gap.points]
            ax.plot(sizes, bounds, ":", color=color, label="of the roofline bounds")
        if gap.break_even is not None:
            ax.axvline(gap.break_even, color=color, linewidth=0.7)
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set(yscale="log", ylabel="time of the dense head ÷ time of the head")
    _finish(ax, [point.batch_size for gap in gaps for point in gap.points], device)
    return figure


def short_name(device: str) -> str:
    """The name of a processor without its trademarks."""
    return device.replace("(R)", "").replace("(TM)", "")


@dataclass(frozen=True)
class _Line:
    """Rows of one module in one mode: modules by colour, modes by dashes, caches by marker."""

    label: str
    color: str
    rows: Sequence[TimingRow]

    @property
    def sizes(self) -> list[int]:
        return [row.batch_size for row in self.rows]

    def draw(self, ax: "Axes", value: Callable[[TimingRow, float], float]) -> None:
        """Draw the medians and a band of their intervals, of values that are monotonic in the time."""
        ax.plot(
            self.sizes,
            [value(row, row.p50_ms) for row in self.rows],
            linestyle=_DASHES[self.rows[0].mode],
            marker="o" if self.rows[0].cache == "warm" else "s",
            markersize=3,
            linewidth=1.2,
            color=self.color,
            label=self.label,
        )
        low, high = _ends([(row.p50_low_ms, row.p50_high_ms, row.p50_ms) for row in self.rows])
        ends = [[value(row, ms) for row, ms in zip(self.rows, end, strict=True)] for end in (low, high)]
        ax.fill_between(self.sizes, ends[0], ends[1], color=self.color, alpha=0.4, linewidth=0)


def _lines(rows: Sequence[TimingRow]) -> list[_Line]:
    """The lines of all modules but the parts of heads, which have a figure of their own."""
    modules = list(dict.fromkeys(row.module for row in rows))
    parts = {part_name(name, stage) for name in modules for stage in STAGES if name != MODEL}
    chosen = [name for name in modules if name not in parts]
    several = len({row.mode for row in rows}) > 1
    found = []
    for index, module in enumerate(chosen):
        own = [row for row in rows if row.module == module]
        for mode, cache in dict.fromkeys((row.mode, row.cache) for row in own):
            label = ", ".join([module, *([mode] if several else []), *(["cold"] if cache == "cold" else [])])
            line = [row for row in own if (row.mode, row.cache) == (mode, cache)]
            found.append(_Line(label, f"C{index}", sorted(line, key=lambda row: row.batch_size)))
    return found


def _ends(intervals: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Lower and upper ends of (low, high, value); of an interval that is unknown, the value."""
    known = [(low, high) if math.isfinite(high) else (value, value) for low, high, value in intervals]
    return [low for low, _ in known], [high for _, high in known]


def _finish(ax: "Axes", sizes: Sequence[int], device: str) -> None:
    ticks = sorted(set(sizes))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{size}" for size in ticks])
    ax.set_xticks([], minor=True)
    # 0.5 and not 5 × 10⁻¹; where there is less than a power of ten, between the powers as well
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if math.log10(high / low) < 1 else "")
    ax.set_xlabel("batch size", fontsize=FONT)
    ax.yaxis.label.set_fontsize(FONT)
    ax.tick_params(labelsize=FONT, which="both")
    ax.set_title(short_name(device), fontsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=FONT)
