"""Figures of a loss landscape: a curve along a line, a map on a plane."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_heads.analysis._shared.figures import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from moe_heads.analysis.loss_landscape.trajectory import Trajectory

__all__ = ["CARD", "FloatArray", "Scale", "legend_above", "plot_line", "plot_plane"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Scale = Literal["linear", "log"]
"""Scale of the loss."""

CARD = (4.4, 2.3)
"""Inches of a figure that fills TensorBoard's card, some 450 by 210 pixels, as it is."""

_NUM_CONTOURS = 9
# The upper part of viridis is too bright for white.
_BRIGHT = 0.6
_SMALL, _SMALLEST = 8, 7
_IN_A_ROW = 4  # entries of a legend


def legend_above(ax: "Axes", title: str, handles: Sequence[Any] | None = None) -> None:
    """Title, and the legend below it, where it hides nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    ax.set_title(title, fontsize=_SMALL, pad=4 + 12 * math.ceil(len(handles) / _IN_A_ROW))
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(handles), _IN_A_ROW),
        fontsize=_SMALLEST,
        frameon=False,
        borderaxespad=0.1,
        handlelength=1.5,
        handletextpad=0.4,
        columnspacing=1.0,
    )
    ax.tick_params(labelsize=_SMALL)


def plot_line(
    alphas: FloatArray,
    losses: FloatArray,
    *,
    center_loss: float,
    fixed: FloatArray | None = None,
    routing_flips: FloatArray | None,
    flip: str = "other experts chosen",
    scale: Scale,
    title: str,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Loss over α with free and with fixed routing, flips on a second axis, points that are not finite as dots."""
    figure, ax = axes_of(ax, CARD)
    finite = np.isfinite(losses)
    ax.plot(alphas, np.where(finite, losses, np.nan), marker=".", markersize=4, color="tab:blue", label="loss")
    if fixed is not None:
        shown = np.where(np.isfinite(fixed), fixed, np.nan)
        ax.plot(alphas, shown, linestyle="--", color="tab:green", label="at fixed routing")
    ax.plot([0.0], [center_loss], marker="*", markersize=9, linestyle="none", color="tab:red", label="trained")
    for alpha in alphas[~finite]:
        ax.axvline(alpha, linestyle=":", color="tab:gray")
    ax.set_yscale(scale)
    ax.set_xlabel("α (step along direction 1)", fontsize=_SMALL)
    ax.set_ylabel("mean loss", fontsize=_SMALL)
    handles = ax.get_legend_handles_labels()[0]
    if routing_flips is not None:
        right = ax.twinx()
        handles += right.plot(alphas, routing_flips, color="tab:orange", alpha=0.7, label=flip)
        right.set_ylabel("share of samples", fontsize=_SMALL)
        right.set_ylim(-0.02, 1.02)
        right.tick_params(labelsize=_SMALL)
    legend_above(ax, title, handles)
    return figure, ax


def plot_plane(
    alphas: FloatArray,
    betas: FloatArray,
    heights: FloatArray,
    *,
    quantity: str = "mean loss",
    limits: tuple[float, float] | None = None,
    scale: Scale,
    title: str,
    trajectory: "Trajectory | None" = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """A quantity over α and β as color with contour lines; cells without a finite value are hatched.

    Args:
        alphas: (A,).
        betas: (B,).
        heights: (A, B).
        quantity: What it is.
        limits: Values of the first and the last color; by default the smallest and the largest there are.
        scale: Of the colors.
        title: Heading.
        trajectory: To be drawn on it.
        ax: See `axes_of`.
    """
    figure, ax = axes_of(ax, CARD)
    # rows of a picture run along the vertical axis
    shown = np.ma.masked_invalid(heights.T)
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    if shown.count():
        bar = _draw_heights(
            figure, ax, (alphas, betas), shown, limits or (float(shown.min()), float(shown.max())), scale
        )
        bar.set_label(quantity + (" (log)" if scale == "log" else ""), fontsize=_SMALL)
    if trajectory is not None:
        _draw_trajectory(ax, trajectory)
    ax.plot(
        [0.0], [0.0], marker="*", markersize=9, color="tab:red", mec="white", mew=0.5, label="trained", linestyle="none"
    )
    ax.set_xlabel("α (step along direction 1)", fontsize=_SMALL)
    ax.set_ylabel("β (direction 2)", fontsize=_SMALL)
    ax.set_xlim(*_limits(alphas))
    ax.set_ylim(*_limits(betas))
    legend_above(ax, title)
    return figure, ax


def _draw_heights(
    figure: "Figure",
    ax: "Axes",
    axes: tuple[FloatArray, FloatArray],
    heights: Any,
    limits: tuple[float, float],
    scale: Scale,
) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    norm = (LogNorm if scale == "log" else Normalize)(*limits)
    colors = ax.pcolormesh(*axes, heights, norm=norm, cmap="viridis", shading="nearest")
    bar = figure.colorbar(colors, ax=ax)
    bar.ax.tick_params(labelsize=_SMALL)
    low, high = float(heights.min()), float(heights.max())
    if high > low:
        space = np.geomspace if scale == "log" else np.linspace
        levels = space(low, high, _NUM_CONTOURS + 2)[1:-1]
        lines = ax.contour(*axes, heights, levels=levels, colors=_contrasting(norm, levels), linewidths=0.6)
        ax.clabel(lines, levels[::3], fmt="%.3g", fontsize=_SMALLEST)
    return bar


def _contrasting(norm: "Normalize", levels: FloatArray) -> list[str]:
    return ["black" if float(norm(level)) > _BRIGHT else "white" for level in levels]


def _draw_trajectory(ax: "Axes", trajectory: "Trajectory") -> None:
    """The run as a path; each point as pale as it is far off the plane, against its distance from the model."""
    x, y = trajectory.coordinates.numpy().T
    off = (trajectory.residuals / trajectory.distances.clamp(min=1e-300)).numpy()
    ax.plot(x, y, color="tab:red", linewidth=1.0)
    for place, share in zip(zip(x, y, strict=True), off, strict=True):
        visible = max(0.25, 1 - float(share))
        ax.plot(*place, marker="o", markersize=4, color="tab:red", mec="white", mew=0.5, alpha=visible)
    ground = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
    ax.annotate(trajectory.labels[0], (x[0], y[0]), fontsize=_SMALLEST, bbox=ground)
    shares = " + ".join(f"{share:.0%}" for share in trajectory.explained_variance)
    ax.plot([], [], color="tab:red", marker="o", markersize=4, label=f"training ({shares} of it)")


def _limits(axis: FloatArray) -> tuple[float, float]:
    """Half a cell beyond the outer points."""
    return float(axis[0] - (axis[1] - axis[0]) / 2), float(axis[-1] + (axis[-1] - axis[-2]) / 2)
