"""Figures of a timing: latency, throughput, the gap and the split."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_heads.callbacks.functional.common.figures import axes_of
from moe_heads.callbacks.functional.timing.calls import MODEL
from moe_heads.callbacks.functional.timing.gap import Gap
from moe_heads.callbacks.functional.timing.row import TimingRow
from moe_heads.callbacks.functional.timing.split import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_gaps", "plot_latency", "plot_split", "plot_throughput"]

# TensorBoard shows a figure about 450 pixels wide: at this size its letters stay readable.
_SIZE = (4.8, 3.6)
_FONT = 8
_DASHES = {"eager": "-", "compiled": "--", "cuda_graph": ":", "bf16": "-.", "channels_last": (0, (1, 1, 3, 1))}
_PART_COLORS = {
    "backbone": "C0",
    "head": "C1",
    "rest": "0.7",
    "router": "C2",
    "dispatch": "C3",
    "experts": "C1",
    "combine": "C4",
}


def plot_latency(rows: Sequence[TimingRow], device: str, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Median latency over batch size: dark bands are intervals of the median, light ones reach p99."""
    figure, ax = axes_of(ax, _SIZE)
    for label, color, dashes, line in _lines(rows):
        sizes, median = [row.batch_size for row in line], [row.p50_ms for row in line]
        ax.plot(sizes, median, dashes, marker="o", markersize=3, linewidth=1.2, color=color, label=label)
        ax.fill_between(sizes, median, [row.p99_ms for row in line], color=color, alpha=0.12, linewidth=0)
        ends = [(row.p50_low_ms, row.p50_high_ms) if math.isfinite(row.p50_high_ms) else (row.p50_ms,) * 2 for row in line]
        ax.fill_between(sizes, *zip(*ends, strict=True), color=color, alpha=0.4, linewidth=0)
    ax.set(yscale="log", ylabel="latency (ms): median, its interval, up to p99")
    _finish(ax, rows, device)
    return figure, ax


def plot_throughput(rows: Sequence[TimingRow], device: str) -> "tuple[Figure, Axes]":
    """Samples a second over batch size, with the interval of the median latency turned over."""
    figure, ax = axes_of(None, _SIZE)
    for label, color, dashes, line in _lines(rows):
        sizes = [row.batch_size for row in line]
        rate = [1e3 * row.batch_size / row.p50_ms for row in line]
        ax.plot(sizes, rate, dashes, marker="o", markersize=3, linewidth=1.2, color=color, label=label)
        low = [1e3 * row.batch_size / row.p50_high_ms if math.isfinite(row.p50_high_ms) else rate[i] for i, row in enumerate(line)]
        high = [1e3 * row.batch_size / row.p50_low_ms if row.p50_low_ms else rate[i] for i, row in enumerate(line)]
        ax.fill_between(sizes, low, high, color=color, alpha=0.3, linewidth=0)
    ax.set(yscale="log", ylabel="samples a second, at the median")
    _finish(ax, rows, device)
    return figure, ax


def plot_gaps(gaps: Sequence[Gap], device: str) -> "Figure":
    """Ratio of the dense head's time to that of the head, over batch size: realised, theoretical, and as bounded."""
    figure, ax = axes_of(None, _SIZE)
    for index, gap in enumerate(gaps):
        name, color = f"{gap.head}, {gap.mode}", f"C{index}"
        sizes, points = [point.batch_size for point in gap.points], gap.points
        ax.plot(sizes, [point.realised for point in points], marker="o", markersize=3, color=color, label=name)
        ends = [(p.low, p.high) if math.isfinite(p.high) else (p.realised,) * 2 for p in points]
        ax.fill_between(sizes, *zip(*ends, strict=True), color=color, alpha=0.25, linewidth=0)
        if gap.mode == "eager":
            ax.plot(sizes, [point.theoretical for point in points], "--", color=color, label="theoretical (FLOPs)")
            bounds = [math.nan if point.bound is None else point.bound for point in points]
            ax.plot(sizes, bounds, ":", color=color, label="roofline bound")
        if gap.break_even is not None:
            ax.axvline(gap.break_even, color=color, linewidth=0.7)
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set(yscale="log", ylabel="time of the dense head ÷ time of the head")
    _finish(ax, [row for gap in gaps for row in gap.points], device)
    return figure


def plot_split(parts: Sequence[Part], device: str) -> "Figure":
    """Bars of the shares of each part: one panel for the model, one for each head."""
    from matplotlib.figure import Figure

    wholes = list(dict.fromkeys(part.whole for part in parts))
    figure = Figure(figsize=(_SIZE[0], 0.6 + 1.7 * len(wholes)), layout="constrained")
    panels = figure.subplots(len(wholes), 1, squeeze=False)[:, 0]
    for panel, whole in zip(panels, wholes, strict=True):
        inside = [part for part in parts if part.whole == whole]
        _draw_shares(panel, inside)
        panel.set_title(f"parts of {'the model' if whole == MODEL else whole}", fontsize=_FONT + 1)
    panels[-1].set_xlabel("batch size", fontsize=_FONT)
    figure.suptitle(f"share of the time on {_short(device)}", fontsize=_FONT + 1)
    return figure


def _draw_shares(ax: "Axes", parts: Sequence[Part]) -> None:
    sizes = list(dict.fromkeys(part.batch_size for part in parts))
    names = list(dict.fromkeys(part.name for part in parts))
    # a difference that came out below zero has no bar
    heights = {(part.batch_size, part.name): max(part.ms, 0.0) for part in parts}
    totals = [sum(heights.get((size, name), 0.0) for name in names) for size in sizes]
    bottom = [0.0] * len(sizes)
    for name in names:
        shares = [heights.get((size, name), 0.0) / total for size, total in zip(sizes, totals, strict=True)]
        ax.bar(range(len(sizes)), shares, bottom=bottom, color=_PART_COLORS.get(name, "C5"), label=name, width=0.75)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
    ax.set_ylim(0, 1)
    ax.tick_params(labelsize=_FONT)
    ax.legend(fontsize=_FONT, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _lines(rows: Sequence[TimingRow]) -> "list[tuple[str, str, object, list[TimingRow]]]":
    """Label, colour, dashes and rows of each line: modules by colour, modes by dashes; parts of heads have the split."""
    modules = list(dict.fromkeys(row.module for row in rows))
    chosen = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
    several = len({(row.mode, row.cache) for row in rows}) > 1
    found = []
    for index, module in enumerate(chosen):
        for mode, cache in dict.fromkeys((row.mode, row.cache) for row in rows if row.module == module):
            line = [row for row in rows if (row.module, row.mode, row.cache) == (module, mode, cache)]
            how = ", ".join([module, *([mode] if several else []), *(["cold"] if cache == "cold" else [])])
            found.append((how, f"C{index}", _DASHES[mode], sorted(line, key=lambda row: row.batch_size)))
    return found


def _finish(ax: "Axes", rows: "Sequence[object]", device: str) -> None:
    sizes = sorted({row.batch_size for row in rows})  # type: ignore[attr-defined]
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size}" for size in sizes])
    ax.set_xticks([], minor=True)
    # 0.5 and not 5 × 10⁻¹
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if _decades(ax) < 1.2 else "")
    ax.set_xlabel("batch size", fontsize=_FONT)
    ax.yaxis.label.set_fontsize(_FONT)
    ax.tick_params(labelsize=_FONT, which="both")
    ax.set_title(_short(device), fontsize=_FONT)
    ax.grid(alpha=0.3, linewidth=0.5)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=_FONT)


def _decades(ax: "Axes") -> float:
    """Powers of ten that the vertical axis spans."""
    low, high = ax.get_ylim()
    return math.log10(high / low)


def _short(device: str) -> str:
    """The name of a processor without its trademarks."""
    return device.replace("(R)", "").replace("(TM)", "")
