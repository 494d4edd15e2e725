"""Figures of a loss landscape: a curve along a line, a map on a plane."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_heads.callbacks.functional.common.figures import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_heads.callbacks.functional.landscape.trajectory import Trajectory

__all__ = ["FloatArray", "Scale", "plot_line", "plot_plane"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Scale = Literal["linear", "log"]
"""Scale of the loss."""

_NUM_CONTOURS = 12
# TensorBoard shows a figure about 450 pixels wide.
_SIZE_LINE, _SIZE_PLANE = (5.0, 3.6), (5.0, 4.2)
_SMALL = 8


def plot_line(
    alphas: FloatArray,
    losses: FloatArray,
    *,
    center_loss: float,
    fixed: FloatArray | None = None,
    routing_flips: FloatArray | None,
    scale: Scale,
    title: str,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Loss over α with free and with fixed routing, flips on a second axis, points that are not finite as dots."""
    figure, ax = axes_of(ax, _SIZE_LINE)
    finite = np.isfinite(losses)
    ax.plot(alphas, np.where(finite, losses, np.nan), marker=".", color="tab:blue", label="loss")
    if fixed is not None:
        shown = np.where(np.isfinite(fixed), fixed, np.nan)
        ax.plot(alphas, shown, linestyle="--", color="tab:green", label="loss, routing held fixed")
    ax.plot([0.0], [center_loss], marker="*", markersize=11, linestyle="none", color="tab:red", label="trained")
    for alpha in alphas[~finite]:
        ax.axvline(alpha, linestyle=":", color="tab:gray")
    ax.set_yscale(scale)
    ax.set_xlabel("α (step along direction 1)", fontsize=9)
    ax.set_ylabel("mean loss", fontsize=9)
    ax.set_title(title, fontsize=9)
    handles = ax.get_legend_handles_labels()[0]
    if routing_flips is not None:
        right = ax.twinx()
        handles += right.plot(alphas, routing_flips, color="tab:orange", alpha=0.7, label="other experts chosen")
        right.set(ylabel="share of samples", ylim=(-0.02, 1.02))
        right.tick_params(labelsize=_SMALL)
    ax.tick_params(labelsize=_SMALL)
    ax.legend(handles=handles, fontsize=_SMALL)
    return figure, ax


def plot_plane(
    alphas: FloatArray,
    betas: FloatArray,
    losses: FloatArray,
    *,
    scale: Scale,
    title: str,
    trajectory: "Trajectory | None" = None,
    ax: "Axes | None" = None,
) -> "tuple[Figure, Axes]":
    """Loss over α and β as colour with contour lines; cells without a finite loss are hatched."""
    figure, ax = axes_of(ax, _SIZE_PLANE)
    # rows of a picture run along the vertical axis
    heights = np.ma.masked_invalid(losses.T)
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    if heights.count():
        _draw_heights(figure, ax, (alphas, betas), heights, scale)
    if trajectory is not None:
        _draw_trajectory(ax, trajectory)
    ax.plot([0.0], [0.0], marker="*", markersize=11, color="tab:red", label="trained", linestyle="none")
    ax.set_xlabel("α (step along direction 1)", fontsize=9)
    ax.set_ylabel("β (step along direction 2)", fontsize=9)
    ax.set_title(title, fontsize=9)
    ax.set_xlim(*_limits(alphas))
    ax.set_ylim(*_limits(betas))
    ax.tick_params(labelsize=_SMALL)
    ax.legend(loc="upper right", fontsize=_SMALL)
    return figure, ax


def _draw_heights(
    figure: "Figure", ax: "Axes", axes: tuple[FloatArray, FloatArray], heights: Any, scale: Scale
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(heights.min()), float(heights.max())
    norm = (LogNorm if scale == "log" else Normalize)(low, high)
    colours = ax.pcolormesh(*axes, heights, norm=norm, cmap="viridis", shading="nearest")
    bar = figure.colorbar(colours, ax=ax)
    bar.set_label("mean loss" + (" (log scale)" if scale == "log" else ""), fontsize=9)
    bar.ax.tick_params(labelsize=_SMALL)
    if high > low:
        space = np.geomspace if scale == "log" else np.linspace
        levels = space(low, high, _NUM_CONTOURS + 2)[1:-1]
        lines = ax.contour(*axes, heights, levels=levels, colors="white", linewidths=0.6)
        ax.clabel(lines, levels[::3], fmt="%.3g", fontsize=7)


def _draw_trajectory(ax: "Axes", trajectory: "Trajectory") -> None:
    """The run as a path; each point as pale as it is far off the plane, against its distance from the model."""
    x, y = trajectory.coordinates.numpy().T
    off = (trajectory.residuals / trajectory.distances.clamp(min=1e-300)).numpy()
    ax.plot(x, y, color="white", linewidth=1.0)
    for place, share in zip(zip(x, y, strict=True), off, strict=True):
        ax.plot(*place, marker="o", markersize=4, color="tab:orange", alpha=max(0.25, 1 - float(share)))
    ax.annotate(trajectory.labels[0], (x[0], y[0]), color="white", fontsize=_SMALL)
    shares = " + ".join(f"{share:.0%}" for share in trajectory.explained_variance)
    ax.plot([], [], color="tab:orange", marker="o", markersize=4, label=f"training ({shares} of it)")


def _limits(axis: FloatArray) -> tuple[float, float]:
    """Half a cell beyond the outer points."""
    return float(axis[0] - (axis[1] - axis[0]) / 2), float(axis[-1] + (axis[-1] - axis[-2]) / 2)
