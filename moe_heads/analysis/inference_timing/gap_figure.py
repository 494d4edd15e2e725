"""Figure of the gap between theoretical and realized speed of a head."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_heads.analysis.inference_timing.figures import FONT, LEGEND, PART_COLORS, SIZE, ends_of, finish, short_name
from moe_heads.analysis.inference_timing.gap_shares import GapShares, gap_shares
from moe_heads.analysis.inference_timing.speedup import Gap
from moe_heads.analysis.inference_timing.stages import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_gaps"]

# Height of a panel with the parts of a head.
_PANEL = 1.8


def plot_gaps(gaps: Sequence[Gap], parts: Sequence[Part], device: str) -> "Figure":
    """Plot the speedup over the dense head, over batch size: realized, theoretical, and the ratio of the bounds.

    A panel for each head below shows its time, in units of that of the dense head, divided between its parts.
    """
    from matplotlib.figure import Figure

    shares = [found for gap in gaps if (found := gap_shares(gap, parts))]
    width, height = SIZE
    figure = Figure(figsize=(width, height + _PANEL * len(shares)), layout="constrained")
    ax, *panels = figure.subplots(1 + len(shares), 1, height_ratios=[height, *[_PANEL] * len(shares)], squeeze=False)[
        :, 0
    ]
    heads = list(dict.fromkeys(gap.head for gap in gaps))
    several_modes = len({gap.mode for gap in gaps}) > 1
    for index, gap in enumerate(gaps):
        text = f"realized, {gap.mode}" if several_modes else "realized"
        _draw_realized(ax, gap, f"C{index}", _label(gap.head, heads, text))
    for head in heads:
        _draw_theory(ax, head, [gap for gap in gaps if gap.head == head], heads)
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set_ylabel("time of dense ÷ time of head")
    finish(ax, [point.batch_size for gap in gaps for point in gap.points], _title(gaps, heads, device))
    ax.legend(**LEGEND)
    for panel, found in zip(panels, shares, strict=True):
        _draw_parts(panel, found, heads)
    return figure


def _title(gaps: Sequence[Gap], heads: Sequence[str], device: str) -> str:
    """Return the device, and the size from which on each head is faster in its first mode."""
    first = {gap.head: gap for gap in reversed(gaps)}
    lines = [_label(head, heads, first[head].headline()) for head in heads]
    return "\n".join([f"speedup; {short_name(device)}", *lines])


def _draw_parts(ax: "Axes", shares: Sequence[GapShares], heads: Sequence[str]) -> None:
    """Draw a bar for each batch size, with marks at the theoretical time and at the time of the launches."""
    places = range(len(shares))
    bottom = [0.0] * len(shares)
    for name in dict.fromkeys(name for each in shares for name in each.parts):
        # a negative difference has no bar
        heights = [max(each.parts.get(name, 0.0), 0.0) for each in shares]
        ax.bar(places, heights, bottom=bottom, color=PART_COLORS[name], label=name, width=0.75)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    marks: dict[str, Any] = {"linestyle": "", "markersize": 4, "color": "0.1"}
    ax.plot(places, [each.theoretical for each in shares], marker="^", label="theoretical", **marks)
    if any(each.launches is not None for each in shares):
        launches = [math.nan if each.launches is None else each.launches for each in shares]
        ax.plot(places, launches, marker="x", label="launches alone", **marks)
    ax.axhline(1, color="0.4", linewidth=0.8, label="dense head")
    ax.set_xticks(places, [f"{each.batch_size}" for each in shares])
    ax.set_xlabel("batch size", fontsize=FONT)
    ax.set_ylabel("time ÷ time of dense", fontsize=FONT)
    ax.set_title(_label(shares[0].head, heads, "where the time goes"), fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.legend(**LEGEND, reverse=True, handlelength=1.0)


def _draw_realized(ax: "Axes", gap: Gap, color: str, label: str) -> None:
    sizes = [point.batch_size for point in gap.points]
    ax.plot(sizes, [point.realized for point in gap.points], marker="o", markersize=3, color=color, label=label)
    low, high = ends_of([(point.low, point.high, point.realized) for point in gap.points])
    ax.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)
    if gap.break_even is not None and gap.break_even_low is not None and gap.break_even_high is not None:
        ax.axvline(gap.break_even, color=color, linewidth=0.7)
        ax.axvspan(gap.break_even_low, gap.break_even_high, color=color, alpha=0.08, linewidth=0)


def _draw_theory(ax: "Axes", head: str, gaps: Sequence[Gap], heads: Sequence[str]) -> None:
    """Draw the ratios that do not depend on the mode, once per head."""
    points = {point.batch_size: point for gap in gaps for point in gap.points}
    bounds = {point.batch_size: point.bound for gap in gaps for point in gap.points if point.bound is not None}
    sizes, gray = sorted(points), f"{0.15 + 0.4 * heads.index(head) / len(heads):.2f}"
    theory, label = [points[size].theoretical for size in sizes], _label(head, heads, "theoretical")
    ax.plot(sizes, theory, "--", marker="^", markersize=3, color=gray, label=label)
    if bounds:
        ratios, label = [bounds.get(size, math.nan) for size in sizes], _label(head, heads, "ratio of bounds")
        ax.plot(sizes, ratios, ":", marker="s", markersize=3, color=gray, label=label)


def _label(head: str, heads: Sequence[str], text: str) -> str:
    return text if len(heads) == 1 else f"{head}, {text}"
