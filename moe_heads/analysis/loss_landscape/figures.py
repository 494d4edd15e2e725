"""Figures of a loss landscape: a curve along a line, a map and a 3-D mesh of a plane."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.figures import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from moe_heads.analysis.loss_landscape.trajectory import Trajectory

__all__ = ["CARD", "FloatArray", "Scale", "legend_above", "plot_line", "plot_plane", "surface_mesh", "triangles"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Scale = Literal["linear", "log"]
"""Scale of the loss."""

CARD = (4.4, 2.3)
"""Size in inches of a figure that fills TensorBoard's card of about 450 by 210 pixels without scaling."""

_NUM_CONTOURS = 9
# White lines are not visible on the upper part of viridis.
_BRIGHT = 0.6
_SMALL, _SMALLEST = 8, 7  # font sizes
_LEGEND_COLUMNS = 4
# TensorBoard's viewer stores the vertex indices of a face in 16 bits.
_MAX_VERTICES = 2**16


def legend_above(ax: "Axes", title: str, handles: Sequence[Any] | None = None) -> None:
    """Set the title, with the legend between title and axes, where it covers nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    ax.set_title(title, fontsize=_SMALL, pad=4 + 12 * math.ceil(len(handles) / _LEGEND_COLUMNS))
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(handles), _LEGEND_COLUMNS),
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
    """Plot the loss over α at free and fixed routing, flips on a second axis, nonfinite points as dotted lines."""
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
        right.set_ylabel("fraction of samples", fontsize=_SMALL)
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
    """Plot a quantity over α and β as color with contour lines. Cells without a finite value are hatched.

    Args:
        alphas: (A,).
        betas: (B,).
        heights: (A, B).
        quantity: Label of the colors.
        limits: Values of the first and the last color. Defaults to the smallest and the largest value.
        scale: Scale of the colors.
        title: Title.
        trajectory: Training run to draw, or None.
        ax: See `axes_of`.
    """
    figure, ax = axes_of(ax, CARD)
    # rows of an image run along the vertical axis
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


def surface_mesh(
    alphas: Tensor, betas: Tensor, losses: Tensor, *, scale: Scale = "linear", tilt: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return vertices, faces and colors of the surface as a triangle mesh of V vertices and F faces.

    Before the tilt, x is α and y is β, each scaled to [-1, 1], and z is the loss or its logarithm, scaled to [0, 1].
    Every triangle appears once with an upward normal (z > 0). Points without a finite loss are omitted, with their
    triangles.

    Args:
        alphas: (A,), increasing.
        betas: (B,), increasing.
        losses: (A, B).
        scale: "log" for the logarithm. Then all finite losses have to be positive.
        tilt: Rotation about the x axis in degrees, which moves the far edge (large β) away from a camera that looks
            along -z with y up.

    Returns:
        Vertices, (1, V, 3), float32. Faces, (1, F, 3), int64. Colors (viridis, by height), (1, V, 3), uint8.

    Raises:
        ValueError: If no triangle is left, or there are more than the 65,536 vertices that the viewer can address.
    """
    from matplotlib import colormaps

    finite = losses.isfinite()
    faces = triangles(finite)
    if not len(faces) or int(finite.sum()) > _MAX_VERTICES:
        raise ValueError(
            f"losses: expected neighboring finite points, {_MAX_VERTICES} at most, got {int(finite.sum())} finite"
            f" points of {losses.numel()}, with {len(faces)} triangles. Change the reach or the number of points."
        )
    heights = losses[finite].log() if scale == "log" else losses[finite]
    heights = _scaled(heights)
    grid = torch.meshgrid(2 * _scaled(alphas) - 1, 2 * _scaled(betas) - 1, indexing="ij")
    x, y, z = grid[0][finite], grid[1][finite], heights
    cosine, sine = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    vertices = torch.stack([x, cosine * y + sine * z, cosine * z - sine * y], dim=-1)
    colors = torch.from_numpy(colormaps["viridis"](heights.numpy(), bytes=True)[:, :3].copy())
    return vertices.float()[None], faces[None], colors[None]


def triangles(finite: Tensor) -> Tensor:
    """Return two triangles per cell, counter-clockwise from above, over finite points numbered row by row, (F, 3)."""
    number = torch.full(finite.shape, -1)
    number[finite] = torch.arange(int(finite.sum()))
    corner, right, up, across = number[:-1, :-1], number[1:, :-1], number[:-1, 1:], number[1:, 1:]
    halves = [torch.stack([corner, right, across], -1), torch.stack([corner, across, up], -1)]
    faces = torch.cat([half.reshape(-1, 3) for half in halves])
    return faces[(faces >= 0).all(1)]


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
    """Draw the run as a path. A point is paler the larger its distance from the plane is, relative to the model's."""
    x, y = trajectory.coordinates.numpy().T
    relative_residuals = (trajectory.residuals / trajectory.distances.clamp(min=1e-300)).numpy()
    ax.plot(x, y, color="tab:red", linewidth=1.0)
    for place, residual in zip(zip(x, y, strict=True), relative_residuals, strict=True):
        visible = max(0.25, 1 - float(residual))
        ax.plot(*place, marker="o", markersize=4, color="tab:red", mec="white", mew=0.5, alpha=visible)
    background = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
    ax.annotate(trajectory.labels[0], (x[0], y[0]), fontsize=_SMALLEST, bbox=background)
    shares = " + ".join(f"{share:.0%}" for share in trajectory.explained_variance)
    ax.plot([], [], color="tab:red", marker="o", markersize=4, label=f"training ({shares} of it)")


def _limits(axis: FloatArray) -> tuple[float, float]:
    """Return limits half a cell beyond the outer points."""
    return float(axis[0] - (axis[1] - axis[0]) / 2), float(axis[-1] + (axis[-1] - axis[-2]) / 2)


def _scaled(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
