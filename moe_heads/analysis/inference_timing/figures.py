"""Figures over batch size: latency, throughput, speedup, and the division of time between parts."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.rows import TimingRow
from moe_heads.analysis.inference_timing.stages import STAGES, Part, part_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FONT",
    "LEGEND",
    "PART_COLORS",
    "SIZE",
    "ends_of",
    "finish",
    "plot_latency",
    "plot_split",
    "plot_throughput",
    "short_name",
]

# A card of TensorBoard shows a figure in about 450 × 210 pixels. At this size, the text stays readable.
SIZE = (4.4, 2.3)
FONT = 8
_MOST_LETTERS = 16
LEGEND: dict[str, Any] = {"fontsize": FONT - 1, "loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
_DASHES: dict[str, Any] = {
    "eager": "-",
    "compiled": "--",
    "partly_compiled": (0, (5, 1)),
    "cuda_graph": ":",
    "bf16": "-.",
    "channels_last": (0, (1, 1, 3, 1)),
    "served": (0, (3, 1, 1, 1)),
}
PART_COLORS = {
    "backbone": "C0",
    "head": "C1",
    "rest": "0.7",
    "router": "C2",
    "dispatch": "C3",
    "experts": "C1",
    "combine": "C4",
}


def plot_latency(rows: Sequence[TimingRow], device: str, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the median latency over batch size: dark bands are intervals of the median, light bands reach p99.

    Dots are the medians of several draws of a batch.
    """
    figure, ax = axes_of(ax, SIZE)
    ax.set_ylabel("latency (ms)")
    title = "median, its interval, up to p99"
    if any(row.spread is not None for row in rows):
        title += "; dots: draws"
    _draw_rows(ax, rows, lambda row, ms: ms, title, device, up_to_p99=True)
    return figure, ax


def plot_throughput(rows: Sequence[TimingRow], device: str) -> "Figure":
    """Plot the samples per second over batch size, at the median latency and the ends of its interval."""
    from matplotlib.ticker import EngFormatter

    figure, ax = axes_of(None, SIZE)
    ax.set_ylabel("samples per second")
    _draw_rows(ax, rows, lambda row, ms: 1e3 * row.batch_size / ms, "at the median and its interval", device)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _draw_rows(
    ax: "Axes",
    rows: Sequence[TimingRow],
    value: Callable[[TimingRow, float], float],
    title: str,
    device: str,
    up_to_p99: bool = False,
) -> None:
    """Draw a monotonic function of the time with a color per module and a dash pattern per mode.

    The stages of heads are left out, because they have their own figure.
    """
    from matplotlib.lines import Line2D

    modules = list(dict.fromkeys(row.module for row in rows))
    stages = {part_name(name, stage) for name in modules for stage in STAGES if name != MODEL}
    modules = [name for name in modules if name not in stages]
    modes = list(dict.fromkeys(row.mode for row in rows if row.module in modules))
    colors = {module: f"C{index}" for index, module in enumerate(modules)}
    styles = {mode: {"linestyle": _DASHES[mode], "marker": "o", "markersize": 3, "linewidth": 1.2} for mode in modes}
    for module, mode in itertools.product(modules, modes):
        line = sorted((r for r in rows if (r.module, r.mode) == (module, mode)), key=lambda row: row.batch_size)
        if not line:
            continue
        sizes, color = [row.batch_size for row in line], colors[module]
        medians = [value(row, row.p50_ms) for row in line]
        ax.plot(sizes, medians, color=color, label=f"{module}, {mode}", **styles[mode])
        low, high = ends_of([(row.p50_low_ms, row.p50_high_ms, row.p50_ms) for row in line])
        ends = [[value(row, ms) for row, ms in zip(line, end, strict=True)] for end in (low, high)]
        ax.fill_between(sizes, ends[0], ends[1], color=color, alpha=0.4, linewidth=0)
        if up_to_p99:
            top = [value(row, row.p99_ms) for row in line]
            ax.fill_between(sizes, medians, top, color=color, alpha=0.12, linewidth=0)
            draws = [(row.batch_size, ms) for row in line if row.spread is not None for ms in row.spread.medians]
            if draws:
                ax.scatter([size for size, _ in draws], [ms for _, ms in draws], s=2, color=color, alpha=0.6)
    finish(ax, [row.batch_size for row in rows], f"{title}; {short_name(device)}")
    entries = [Line2D([], [], color=color, label=_shortened(module)) for module, color in colors.items()]
    if len(modes) > 1:
        entries += [Line2D([], [], color="0.3", label=mode, **style) for mode, style in styles.items()]
    if entries:
        ax.legend(handles=entries, **LEGEND)


def _shortened(name: str) -> str:
    """Return the end of a dotted name, which is more specific than its beginning."""
    return name if len(name) <= _MOST_LETTERS else f"…{name[1 - _MOST_LETTERS :]}"


def short_name(device: str) -> str:
    """Return the name of a processor without its trademark signs."""
    return device.replace("(R)", "").replace("(TM)", "")


def ends_of(intervals: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Return lower and upper ends of (low, high, value); the value replaces the ends of an unknown interval."""
    known = [(low, high) if math.isfinite(high) else (value, value) for low, high, value in intervals]
    return [low for low, _ in known], [high for _, high in known]


def finish(ax: "Axes", sizes: Sequence[int], title: str) -> None:
    """Format logarithmic axes with plain numbers: the batch sizes, and 0.5 instead of a power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    ticks = sorted(set(sizes))
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(ticks, [f"{size}" for size in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    # ticks between the powers of ten where there are few of them
    steps = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("batch size", fontsize=FONT)
    ax.yaxis.label.set_fontsize(FONT)
    ax.tick_params(labelsize=FONT, which="both")
    ax.set_title(title, fontsize=FONT)
    ax.grid(alpha=0.3, linewidth=0.5)


def plot_split(parts: Sequence[Part], device: str) -> "Figure":
    """Plot bars with the share of each part over batch size: one panel for the model and each head, two per row."""
    from matplotlib.figure import Figure

    wholes = list(dict.fromkeys(part.whole for part in parts))
    num_rows, num_columns = -(-len(wholes) // 2), min(len(wholes), 2)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for panel, whole in zip(panels, wholes, strict=False):
        _draw_shares(panel, [part for part in parts if part.whole == whole])
        panel.set_title(f"parts of {'the model' if whole == MODEL else whole}", fontsize=FONT)
        panel.set_xlabel("batch size", fontsize=FONT)
    for empty in panels[len(wholes) :]:
        empty.remove()
    figure.suptitle(f"share of the time; {short_name(device)}", fontsize=FONT)
    return figure


def _draw_shares(ax: "Axes", parts: Sequence[Part]) -> None:
    sizes = list(dict.fromkeys(part.batch_size for part in parts))
    names = list(dict.fromkeys(part.name for part in parts))
    # a negative difference has no bar
    heights = {(part.batch_size, part.name): max(part.ms, 0.0) for part in parts}
    totals = [sum(heights.get((size, name), 0.0) for name in names) for size in sizes]
    bottom = [0.0] * len(sizes)
    for name in names:
        shares = [heights.get((size, name), 0.0) / total for size, total in zip(sizes, totals, strict=True)]
        ax.bar(range(len(sizes)), shares, bottom=bottom, color=PART_COLORS[name], label=name, width=0.75)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes], rotation=90 if len(sizes) > 3 else 0)
    ax.set_ylim(0, 1)
    ax.tick_params(labelsize=FONT - 1)
    ax.legend(**LEGEND, reverse=True, handlelength=1.0)
