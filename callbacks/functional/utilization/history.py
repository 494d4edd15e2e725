"""Figure: how the choices were spread over the experts, epoch by epoch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_heads.callbacks.functional.common.figures import axes_of
from moe_heads.routing import RoutingStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_load_history"]


def plot_load_history(history: Sequence[RoutingStats], ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Stacked shares of the experts' load over the epochs; even bands are balance, a vanishing band is a dying expert.

    Args:
        history: Statistics of each epoch, oldest first.
        ax: Axes to draw on; a new figure by default.

    Returns:
        Figure and axes.
    """
    figure, ax = axes_of(ax, (4.6, 3.2))
    load = torch.stack([stats.load for stats in history]).double().cpu()
    epochs = range(1, len(history) + 1)
    bottom = torch.zeros(len(history), dtype=torch.float64)
    for expert in range(load.shape[1]):
        ax.bar(epochs, load[:, expert], bottom=bottom, width=1.0, label=f"expert {expert}")
        bottom += load[:, expert]
    ax.set(xlabel="epoch", ylabel="share of the choices", ylim=(0, 1))
    ax.set_title("load of the experts over training", fontsize=9)
    if load.shape[1] <= 16:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure, ax
