"""Comparison of the landscapes of several models in one figure."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.loss_landscape.figures import CARD, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_heads.analysis.loss_landscape.result import LossLandscapeResult

__all__ = ["plot_lines"]


def plot_lines(results: "Mapping[str, LossLandscapeResult]", ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Plot the rise of the loss over α for several models, at fixed routing as a dashed line of the same color.

    Args:
        results: Landscapes along a line, by name.
        ax: Axes to draw into. By default new axes in a figure that pyplot does not manage.

    Raises:
        ValueError: If there are none, or one of them is a plane.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import loss_landscape, plot_lines
        >>> model, x = torch.nn.Linear(1, 1), torch.ones(1, 1)
        >>> line = loss_landscape(model, lambda m, batch: m(batch).square().mean(), [x], direction1=torch.ones(2))
        >>> figure, ax = plot_lines({"one": line, "the other": line})
    """
    if not results or any(result.betas is not None for result in results.values()):
        raise ValueError(f"results: expected landscapes along a line, got {'a plane' if results else 'none'}.")
    figure, ax = axes_of(ax, CARD)
    for number, (name, result) in enumerate(results.items()):
        rises = (result.losses - result.center_loss).nan_to_num(math.nan, math.nan)
        ax.plot(result.alphas.numpy(), rises.numpy(), marker=".", color=f"C{number}", label=name)
        if result.losses_fixed_routing is not None:
            fixed = (result.losses_fixed_routing - result.center_loss).nan_to_num(math.nan, math.nan)
            ax.plot(result.alphas.numpy(), fixed.numpy(), linestyle="--", color=f"C{number}")
    ax.set_xlabel("α (step along direction 1)", fontsize=8)
    ax.set_ylabel("rise of the loss", fontsize=8)
    legend_above(ax, "rise of the loss (dashed: fixed routing)")
    return figure, ax
