"""Figure of the spectrum of a Hessian."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_heads.callbacks.functional.common.figures import axes_of
from moe_heads.callbacks.functional.curvature.density import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_spectrum"]


def plot_spectrum(
    eigenvalues: Sequence[float], density: SpectralDensity | None, ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """Logarithmic density of the eigenvalues with the largest ones marked on the axis.

    Args:
        eigenvalues: The largest eigenvalues, descending.
        density: Density of all of them; without it only the marks are drawn.
        ax: Axes to draw into; by default those of a new figure that pyplot does not know.

    Returns:
        The figure and the axes.
    """
    figure, ax = axes_of(ax)
    if density is not None:
        ax.plot(density.grid.numpy(), density.values.numpy(), label=f"density (sigma = {density.sigma:.2g})")
        ax.set_yscale("log")
        # Down to where the faintest single eigenvalue still shows; below are only the tails of the Gaussians.
        faintest = float(density.weights[density.weights > 1e-12].min()) / (density.sigma * math.sqrt(2 * math.pi))
        ax.set_ylim(bottom=faintest / 3)
        ax.set_ylabel("density")
    else:
        ax.set_yticks([])
    # The marks sit on the lower edge whatever the vertical scale is.
    ax.plot(
        list(eigenvalues),
        [0.0] * len(eigenvalues),
        transform=ax.get_xaxis_transform(),
        linestyle="none",
        marker="^",
        markersize=9,
        color="tab:red",
        clip_on=False,
        label=f"top {len(eigenvalues)} eigenvalues",
    )
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_title(f"largest eigenvalue {eigenvalues[0]:.4g}")
    ax.legend()
    return figure, ax
