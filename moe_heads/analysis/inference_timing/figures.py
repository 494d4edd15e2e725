"""Figures over batch size: latency and throughput."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.heads import STAGES, part_name
from moe_heads.analysis.inference_timing.row import TimingRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FONT", "SIZE", "ends_of", "finish", "plot_latency", "plot_throughput", "short_name"]

# A card of TensorBoard shows a figure in about 450 × 210 pixels: at this size its letters stay readable.
SIZE = (4.4, 2.3)
FONT = 8
_MOST_LETTERS = 16
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
    lines = _lines(rows)
    for line in lines:
        line.draw(ax, lambda row, ms: ms)
        top = [row.p99_ms for row in line.rows]
        ax.fill_between(line.sizes, [row.p50_ms for row in line.rows], top, color=line.color, alpha=0.12, linewidth=0)
    ax.set_ylabel("latency (ms)")
    finish(ax, [row.batch_size for row in rows], f"median, its interval, up to p99; {short_name(device)}")
    _explain(ax, lines)
    return figure, ax


def plot_throughput(rows: Sequence[TimingRow], device: str) -> "tuple[Figure, Axes]":
    """Samples a second over batch size, at the median latency and the ends of its interval."""
    from matplotlib.ticker import EngFormatter

    figure, ax = axes_of(None, SIZE)
    lines = _lines(rows)
    for line in lines:
        line.draw(ax, lambda row, ms: 1e3 * row.batch_size / ms)
    ax.set_ylabel("samples a second")
    finish(ax, [row.batch_size for row in rows], f"at the median and its interval; {short_name(device)}")
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    _explain(ax, lines)
    return figure, ax


def short_name(device: str) -> str:
    """The name of a processor without its trademarks."""
    return device.replace("(R)", "").replace("(TM)", "")


@dataclass(frozen=True)
class _Line:
    """Rows of one module in one mode: modules by color, modes by dashes, caches by marker."""

    module: str
    color: str
    rows: Sequence[TimingRow]

    @property
    def sizes(self) -> list[int]:
        return [row.batch_size for row in self.rows]

    @property
    def way(self) -> tuple[str, str]:
        return self.rows[0].mode, self.rows[0].cache

    @property
    def look(self) -> dict[str, Any]:
        mode, cache = self.way
        return {
            "linestyle": _DASHES[mode],
            "marker": "o" if cache == "warm" else "s",
            "markersize": 3,
            "linewidth": 1.2,
        }

    def draw(self, ax: "Axes", value: Callable[[TimingRow, float], float]) -> None:
        """Draw the medians and a band of their intervals, of values that are monotonic in the time."""
        medians = [value(row, row.p50_ms) for row in self.rows]
        ax.plot(self.sizes, medians, color=self.color, label=", ".join((self.module, *self.way)), **self.look)
        low, high = ends_of([(row.p50_low_ms, row.p50_high_ms, row.p50_ms) for row in self.rows])
        ends = [[value(row, ms) for row, ms in zip(self.rows, end, strict=True)] for end in (low, high)]
        ax.fill_between(self.sizes, ends[0], ends[1], color=self.color, alpha=0.4, linewidth=0)


def _lines(rows: Sequence[TimingRow]) -> list[_Line]:
    """The lines of all modules but the parts of heads, which have a figure of their own."""
    modules = list(dict.fromkeys(row.module for row in rows))
    parts = {part_name(name, stage) for name in modules for stage in STAGES if name != MODEL}
    found = []
    for index, module in enumerate(name for name in modules if name not in parts):
        own = [row for row in rows if row.module == module]
        for way in dict.fromkeys((row.mode, row.cache) for row in own):
            line = sorted((row for row in own if (row.mode, row.cache) == way), key=lambda row: row.batch_size)
            found.append(_Line(module, f"C{index}", line))
    return found


def _explain(ax: "Axes", lines: Sequence[_Line]) -> None:
    """A legend beside the axes: a color a module and, if there are several, a dash a mode and cache."""
    from matplotlib.lines import Line2D

    colors = {line.module: line.color for line in lines}
    entries = [Line2D([], [], color=color, label=_ending(module)) for module, color in colors.items()]
    ways = {line.way: line.look for line in lines}
    if len(ways) > 1:
        entries += [
            Line2D([], [], color="0.3", label=mode if cache == "warm" else f"{mode}, {cache}", **look)
            for (mode, cache), look in ways.items()
        ]
    if entries:
        ax.legend(handles=entries, fontsize=FONT - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _ending(name: str) -> str:
    """The end of a dotted name, which tells more than its beginning."""
    return name if len(name) <= _MOST_LETTERS else f"…{name[1 - _MOST_LETTERS :]}"


def ends_of(intervals: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Lower and upper ends of (low, high, value); of an interval that is unknown, the value."""
    known = [(low, high) if math.isfinite(high) else (value, value) for low, high, value in intervals]
    return [low for low, _ in known], [high for _, high in known]


def finish(ax: "Axes", sizes: Sequence[int], title: str) -> None:
    """Logarithmic axes with plain numbers: the batch sizes, and 0.5 instead of a power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    ticks = sorted(set(sizes))
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(ticks, [f"{size}" for size in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    # between the powers of ten where there are few of them
    steps = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("batch size", fontsize=FONT)
    ax.yaxis.label.set_fontsize(FONT)
    ax.tick_params(labelsize=FONT, which="both")
    ax.set_title(title, fontsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)
