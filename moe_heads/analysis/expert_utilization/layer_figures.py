"""Figures of many layers: one row per layer, readable for 48 layers of 128 experts."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.expert_utilization.layers import Layer
from moe_heads.analysis.expert_utilization.maps import (
    SMALL,
    draw_map,
    label_layers,
    label_numbers,
    map_height,
    map_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_dead_by_epoch", "plot_load_by_layer"]

# Largest number of epochs, and of layers, for which the map of the dead experts has numbers.
_MAX_EPOCHS, _MAX_LAYERS = 20, 50


def plot_load_by_layer(layers: Mapping[str, Layer], ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw the share of every expert (column) of every layer (row) in units of the fair share. Dead experts are red.

    The range of the colors is fixed, so that the maps of several epochs can be compared.

    Args:
        layers: The layers by name, at least one. The row of a layer with fewer experts than others is hatched at the
            end, and that of a layer without a counted row is hatched.
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    import matplotlib

    num_experts = max(layer.num_experts for layer in layers.values())
    shares = np.full((len(layers), num_experts), math.nan)
    for row, layer in enumerate(layers.values()):
        shares[row, : layer.num_experts] = layer.relative.numpy()
        shares[row, list(layer.dead)] = -1  # below the range of the colors
    num_dead = sum(len(layer.dead) for layer in layers.values())
    figure, ax = axes_of(ax, (map_width(num_experts), map_height(len(layers))))
    colors = matplotlib.colormaps["viridis"].with_extremes(under="red")
    draw_map(ax, shares, "load / fair share", 2, colors, "both" if num_dead else "max")
    label_layers(ax, list(layers))
    label_numbers(ax, "x", num_experts, "expert")
    dead = f"{num_dead} dead expert{'' if num_dead == 1 else 's'} (red)" if num_dead else "no dead expert"
    ax.set_title(f"{len(layers)} layers, {dead}", fontsize=9)
    return figure, ax


def plot_dead_by_epoch(dead: Mapping[str, Mapping[int, int]], ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw the number of dead experts of every layer (row) in every epoch (column).

    Args:
        dead: Number of dead experts by layer and epoch. A missing epoch is hatched.
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    from matplotlib.ticker import MaxNLocator

    known = {epoch for numbers in dead.values() for epoch in numbers}
    epochs = range(min(known), max(known) + 1)
    numbers = np.array([[row.get(epoch, math.nan) for epoch in epochs] for row in dead.values()])
    largest = max(1, int(np.nanmax(numbers)))
    figure, ax = axes_of(ax, (map_width(len(epochs)), map_height(len(dead))))
    bar = draw_map(ax, numbers, "dead experts", largest, "Reds", left=epochs[0])
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if len(epochs) <= _MAX_EPOCHS and len(dead) <= _MAX_LAYERS:
        for (row, column), number in np.ndenumerate(numbers):
            if number > 0:
                color = "white" if number > 0.6 * largest else "black"
                position = epochs[column], row
                ax.text(*position, f"{number:.0f}", ha="center", va="center", fontsize=6, color=color)
    label_layers(ax, list(dead))
    ax.set_xlabel("epoch", fontsize=SMALL)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(axis="x", labelsize=SMALL)
    ax.set_title("dead experts by layer over training", fontsize=9)
    return figure, ax
