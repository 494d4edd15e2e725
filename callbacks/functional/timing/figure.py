"""Figure of latency over batch size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.callbacks.functional.common.figures import axes_of
from moe_heads.callbacks.functional.timing.row import TimingRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_timing"]

_SHIFT = 1.06


def plot_timing(rows: Sequence[TimingRow], device: str, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Median latency over batch size on logarithmic axes: thick whiskers up to p90, thin ones up to p99."""
    figure, ax = axes_of(ax)
    for index, module in enumerate(dict.fromkeys(row.module for row in rows)):
        line = sorted((row for row in rows if row.module == module), key=lambda row: row.batch_size)
        # side by side, so that whiskers of different modules do not cover each other
        sizes = np.array([row.batch_size for row in line]) * _SHIFT**index
        median = np.array([row.p50_ms for row in line])
        colour = f"C{index}"
        ax.plot(sizes, median, marker="o", markersize=4, color=colour, label=module)
        for upper, width in (([row.p90_ms for row in line], 2.5), ([row.p99_ms for row in line], 1.0)):
            whiskers = np.stack([np.zeros_like(median), np.array(upper) - median])
            ax.errorbar(sizes, median, whiskers, fmt="none", ecolor=colour, elinewidth=width, capsize=2)
    ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="latency (ms): median, p90, p99")
    ax.set_title(f"inference on {device}", fontsize=10)
    ax.legend()
    return figure, ax
