"""Figure of how one head's experts are used."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from moe_heads.callbacks.functional.utilization.head import HeadUtilization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_utilization"]

# Cells up to which each holds its number, where that is not 0.00.
_MAX_LABELLED_CELLS = 200
_LEAST_LABELLED = 0.005


def plot_utilization(
    name: str, head: HeadUtilization, class_names: Sequence[str], ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """Bars of load and importance with the fair share, and below them the class map where there is one.

    Args:
        name: Name of the head.
        head: Its utilisation.
        class_names: Names of the classes.
        ax: Axes for the class map alone, or for the bars when there is none; by default a new figure for both.

    Returns:
        The figure, and the axes of the class map (of the bars, when there is none).
    """
    from matplotlib.figure import Figure

    bars = None
    if ax is None:
        rows = 0 if head.class_map is None else len(head.class_map)
        height = 2.5 + 0.2 * rows + min(0.2 * rows, 2)
        figure = Figure(figsize=(1.5 + 0.75 * max(len(head.load), 6), height), layout="constrained")
        if rows:
            bars, ax = figure.subplots(2, 1, sharex=True, height_ratios=(4, max(rows, 4)))
        else:
            ax = figure.subplots()
    if head.class_map is None:
        bars = ax
    else:
        _draw_map(ax, head.class_map, class_names)
    if bars is not None:
        _draw_bars(bars, head)
    ax.set_xlabel("expert")
    ax.set_xticks(range(len(head.load)))
    information = head.mutual_information
    told = "" if information is None else f", I(class; expert) {information:.2f} nats"
    title = f"{name}: {head.effective_experts:.1f} of {len(head.load)} experts in effect{told}"
    (ax if bars is None else bars).set_title(title, fontsize=10)
    root = ax.get_figure(root=True)
    assert isinstance(root, Figure)
    return root, ax


def _draw_bars(ax: "Axes", head: HeadUtilization) -> None:
    experts = np.arange(len(head.load))
    ax.bar(experts - 0.2, head.load.numpy(), 0.4, label="load")
    ax.bar(experts + 0.2, head.importance.numpy(), 0.4, label="importance")
    ax.axhline(1 / len(head.load), color="black", linestyle=":", linewidth=1, label="fair share")
    ax.set_ylabel("share")
    ax.legend(fontsize=7, ncols=3)
    for expert in head.dead_experts:
        ax.annotate("dead", (expert, 0), ha="center", va="bottom", fontsize=7, color="tab:red")


def _draw_map(ax: "Axes", class_map: Tensor, class_names: Sequence[str]) -> None:
    shares = np.ma.masked_invalid(class_map.numpy())
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    image = ax.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax, label="share of the mixing weight")
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set_ylabel("class")
    if shares.size <= _MAX_LABELLED_CELLS:
        for (row, column), share in np.ndenumerate(shares):
            if share is not np.ma.masked and share >= _LEAST_LABELLED:
                colour = "white" if share < 0.6 else "black"
                ax.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
