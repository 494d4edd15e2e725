"""Figures of a loss landscape: a curve along a line, a map on a plane."""

from typing import TYPE_CHECKING

import numpy as np

from moe_heads.callbacks.functional.figures import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_heads.callbacks.functional.landscape.result import LossLandscapeResult

__all__ = ["plot_line", "plot_plane"]

_NUM_CONTOURS = 12


def plot_line(result: "LossLandscapeResult", ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Loss over α, the routing flips on a second axis, points without a finite loss as dotted lines."""
    figure, ax = axes_of(ax)
    alphas, losses = result.alphas.numpy(), result.losses.numpy()
    finite = np.isfinite(losses)
    ax.plot(alphas, np.where(finite, losses, np.nan), marker=".", color="tab:blue", label="loss")
    ax.plot([0.0], [result.center_loss], marker="*", markersize=12, linestyle="none", color="tab:red", label="trained")
    for alpha in alphas[~finite]:
        ax.axvline(alpha, linestyle=":", color="tab:gray")
    ax.set_yscale(result.scale)
    ax.set(xlabel="α (step along direction 1)", ylabel="mean loss", title=_title(result))
    handles = ax.get_legend_handles_labels()[0]
    if result.routing_flips is not None:
        right = ax.twinx()
        handles += right.plot(alphas, result.routing_flips.numpy(), color="tab:orange", label="other experts chosen")
        right.set(ylabel="share of samples", ylim=(-0.02, 1.02))
    ax.legend(handles=handles)
    return figure, ax


def plot_plane(result: "LossLandscapeResult", ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Loss over α and β as colour with contour lines; cells without a finite loss are hatched."""
    from matplotlib.colors import LogNorm, Normalize

    assert result.betas is not None
    figure, ax = axes_of(ax, (6, 5))
    # rows of a picture run along the vertical axis
    losses = np.ma.masked_invalid(result.losses.T.numpy())
    alphas, betas = result.alphas.numpy(), result.betas.numpy()
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    if losses.count():
        low, high = float(losses.min()), float(losses.max())
        norm = (LogNorm if result.scale == "log" else Normalize)(low, high)
        colours = ax.pcolormesh(alphas, betas, losses, norm=norm, cmap="viridis", shading="nearest")
        figure.colorbar(colours, ax=ax, label="mean loss" + (" (log scale)" if result.scale == "log" else ""))
        if high > low:
            space = np.geomspace if result.scale == "log" else np.linspace
            levels = space(low, high, _NUM_CONTOURS + 2)[1:-1]
            lines = ax.contour(alphas, betas, losses, levels=levels, colors="white", linewidths=0.6)
            ax.clabel(lines, levels[::3], fmt="%.3g", fontsize=7)
    ax.plot([0.0], [0.0], marker="*", markersize=12, color="tab:red", label="trained", linestyle="none")
    ax.set(xlabel="α (step along direction 1)", ylabel="β (step along direction 2)", title=_title(result))
    ax.legend(loc="upper right")
    return figure, ax


def _title(result: "LossLandscapeResult") -> str:
    lost = f", {result.num_nonfinite} points not finite" if result.num_nonfinite else ""
    return f"loss {result.center_loss:.4g} at the centre ({result.num_samples} samples{lost})"
