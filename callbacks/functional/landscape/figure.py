"""Figures of a loss landscape: a curve along a line, a map on a plane."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_heads.callbacks.functional.common.figures import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FloatArray", "Scale", "plot_line", "plot_plane"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Scale = Literal["linear", "log"]
"""Scale of the loss."""

_NUM_CONTOURS = 12


def plot_line(
    alphas: FloatArray,
    losses: FloatArray,
    *,
    center_loss: float,
    routing_flips: FloatArray | None,
    scale: Scale,
    title: str,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Loss over α, the routing flips on a second axis, points without a finite loss as dotted lines."""
    figure, ax = axes_of(ax)
    finite = np.isfinite(losses)
    ax.plot(alphas, np.where(finite, losses, np.nan), marker=".", color="tab:blue", label="loss")
    ax.plot([0.0], [center_loss], marker="*", markersize=12, linestyle="none", color="tab:red", label="trained")
    for alpha in alphas[~finite]:
        ax.axvline(alpha, linestyle=":", color="tab:gray")
    ax.set_yscale(scale)
    ax.set(xlabel="α (step along direction 1)", ylabel="mean loss", title=title)
    handles = ax.get_legend_handles_labels()[0]
    if routing_flips is not None:
        right = ax.twinx()
        handles += right.plot(alphas, routing_flips, color="tab:orange", label="other experts chosen")
        right.set(ylabel="share of samples", ylim=(-0.02, 1.02))
    ax.legend(handles=handles)
    return figure, ax


def plot_plane(
    alphas: FloatArray,
    betas: FloatArray,
    losses: FloatArray,
    *,
    scale: Scale,
    title: str,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Loss over α and β as colour with contour lines; cells without a finite loss are hatched."""
    from matplotlib.colors import LogNorm, Normalize

    figure, ax = axes_of(ax, (6, 5))
    # rows of a picture run along the vertical axis
    heights = np.ma.masked_invalid(losses.T)
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    if heights.count():
        low, high = float(heights.min()), float(heights.max())
        norm = (LogNorm if scale == "log" else Normalize)(low, high)
        colours = ax.pcolormesh(alphas, betas, heights, norm=norm, cmap="viridis", shading="nearest")
        figure.colorbar(colours, ax=ax, label="mean loss" + (" (log scale)" if scale == "log" else ""))
        if high > low:
            space = np.geomspace if scale == "log" else np.linspace
            levels = space(low, high, _NUM_CONTOURS + 2)[1:-1]
            lines = ax.contour(alphas, betas, heights, levels=levels, colors="white", linewidths=0.6)
            ax.clabel(lines, levels[::3], fmt="%.3g", fontsize=7)
    ax.plot([0.0], [0.0], marker="*", markersize=12, color="tab:red", label="trained", linestyle="none")
    ax.set(xlabel="α (step along direction 1)", ylabel="β (step along direction 2)", title=title)
    ax.legend(loc="upper right")
    return figure, ax
