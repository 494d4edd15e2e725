"""Figure: how the choices were spread over the experts, epoch by epoch."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.routing import RoutingStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_load_history"]

_MAX_BANDS = 16


def plot_load_history(history: Mapping[int, RoutingStats], ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Load of each expert over the epochs: a vanishing band (or row) is a dying expert.

    Up to 16 experts as stacked shares, more of them as a heat map in units of the fair share.

    Args:
        history: Statistics by epoch; an epoch that is missing stays empty.
        ax: Axes to draw on; a new figure by default.

    Returns:
        Figure and axes.
    """
    from matplotlib.ticker import MaxNLocator

    figure, ax = axes_of(ax, (4.4, 2.3))
    epochs = range(min(history), max(history) + 1)
    missing = torch.full_like(next(iter(history.values())).load, math.nan)
    load = torch.stack([history[e].load if e in history else missing for e in epochs]).double().cpu()
    num_experts = load.shape[1]
    ax.set_title("load of the experts over training", fontsize=9)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if num_experts > _MAX_BANDS:
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, num_experts - 0.5, -0.5)
        relative = (num_experts * load.t()).numpy()
        image = ax.imshow(relative, aspect="auto", extent=extent, vmin=0, vmax=2, interpolation="nearest")
        figure.colorbar(image, ax=ax, label="load / fair share", extend="max")
        ax.set_ylabel("expert")
        return figure, ax
    bottom = torch.zeros(len(epochs), dtype=torch.float64)
    for expert in range(num_experts):
        ax.bar(epochs, load[:, expert], bottom=bottom, width=1.0, label=f"expert {expert}")
        bottom += load[:, expert]
    ax.set(ylabel="share of the choices", ylim=(0, 1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, labelspacing=0.2, frameon=False)
    return figure, ax
