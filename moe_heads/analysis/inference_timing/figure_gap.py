"""Figure of the gap between theoretical and realized speed."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.inference_timing.figures import FONT, SIZE, ends_of, finish, short_name
from moe_heads.analysis.inference_timing.gap import Gap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_gaps"]


def plot_gaps(gaps: Sequence[Gap], device: str) -> "Figure":
    """Ratio of the dense head's time to that of the head, over batch size: realized, theoretical, and of the bounds."""
    figure, ax = axes_of(None, SIZE)
    heads = list(dict.fromkeys(gap.head for gap in gaps))
    several_modes = len({gap.mode for gap in gaps}) > 1
    for index, gap in enumerate(gaps):
        _draw_realized(
            ax, gap, f"C{index}", _label(gap, heads, f"realized, {gap.mode}" if several_modes else "realized")
        )
    for head in heads:
        _draw_theory(ax, [gap for gap in gaps if gap.head == head], heads)
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set_ylabel("time of dense ÷ time of head")
    finish(ax, [point.batch_size for gap in gaps for point in gap.points], f"speed-up; {short_name(device)}")
    ax.legend(fontsize=FONT - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _draw_realized(ax: "Axes", gap: Gap, color: str, label: str) -> None:
    sizes = [point.batch_size for point in gap.points]
    ax.plot(sizes, [point.realized for point in gap.points], marker="o", markersize=3, color=color, label=label)
    low, high = ends_of([(point.low, point.high, point.realized) for point in gap.points])
    ax.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)
    if gap.break_even is not None and gap.break_even_low is not None and gap.break_even_high is not None:
        ax.axvline(gap.break_even, color=color, linewidth=0.7)
        ax.axvspan(gap.break_even_low, gap.break_even_high, color=color, alpha=0.08, linewidth=0)


def _draw_theory(ax: "Axes", gaps: Sequence[Gap], heads: Sequence[str]) -> None:
    """What does not depend on the mode, once a head."""
    points = {point.batch_size: point for gap in gaps for point in gap.points}
    bounds = {point.batch_size: point.bound for gap in gaps for point in gap.points if point.bound is not None}
    sizes, gray = sorted(points), f"{0.15 + 0.4 * heads.index(gaps[0].head) / len(heads):.2f}"
    theory = [points[size].theoretical for size in sizes]
    ax.plot(sizes, theory, "--", marker="^", markersize=3, color=gray, label=_label(gaps[0], heads, "theoretical"))
    if bounds:
        ratios, label = [bounds.get(size, math.nan) for size in sizes], _label(gaps[0], heads, "ratio of bounds")
        ax.plot(sizes, ratios, ":", marker="s", markersize=3, color=gray, label=label)


def _label(gap: Gap, heads: Sequence[str], text: str) -> str:
    return text if len(heads) == 1 else f"{gap.head}, {text}"
