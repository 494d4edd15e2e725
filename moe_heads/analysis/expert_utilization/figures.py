"""Figures of the expert utilization of one head, in a size that is readable in the cards of TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.figures import axes_of, plain_text
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.maps import CARD_HEIGHT, SMALL, draw_map, label_numbers, map_height
from moe_heads.routing import RoutingStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_classes", "plot_coactivation", "plot_load", "plot_load_history", "plot_utilization"]

# Largest number of cells, and of experts, for which the cells have labels in percent, and smallest labeled share.
_MAX_LABELED_CELLS, _MAX_LABELED_EXPERTS = 200, 16
_MIN_LABELED = 0.005

# Largest number of experts drawn as separate bars over the epochs.
_MAX_BARS = 16

# Largest number of characters of a class name that leaves enough space for the map.
_MAX_NAME = 12


def plot_utilization(
    name: str, head: HeadUtilization, class_names: Sequence[str], ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """Draw bars of load and importance with the fair share, and below them the class map if there is one.

    Args:
        name: Name of the head.
        head: Its utilization.
        class_names: Names of the classes.
        ax: Axes for the class map alone, or for the bars if there is none. The default is a new figure for both.

    Returns:
        The figure, and the axes of the class map (of the bars if there is none).
    """
    from matplotlib.figure import Figure

    if head.class_map is None:
        return plot_load(name, head, ax)
    if ax is not None:
        return plot_classes(name, head, class_names, ax)
    rows = len(head.class_map)
    figure = Figure(figsize=(_width(len(head.load)), 2.2 + min(0.25 * rows, 10)), layout="constrained")
    bars, ax = figure.subplots(2, 1, sharex=True, height_ratios=(4, max(rows * 0.6, 4)))
    plot_load(name, head, bars)
    bars.set_xlabel("")
    _draw_classes(ax, head.class_map, class_names)
    label_numbers(ax, "x", len(head.load), "expert")
    return figure, ax


def plot_load(name: str, head: HeadUtilization, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw bars of load and importance with the fair share. Dead and starved experts have a label or a marker.

    Args:
        name: Name of the head.
        head: Its utilization.
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    figure, ax = axes_of(ax, (_width(len(head.load)), CARD_HEIGHT))
    experts, many = np.arange(len(head.load)), len(head.load) > _MAX_LABELED_EXPERTS
    if many:  # two bars of an expert would have a width of two pixels
        ax.bar(experts, head.load.numpy(), 1.0, label="load")
        ax.step(experts, head.importance.numpy(), where="mid", color="tab:orange", linewidth=1, label="importance")
    else:
        ax.bar(experts - 0.2, head.load.numpy(), 0.4, label="load")
        ax.bar(experts + 0.2, head.importance.numpy(), 0.4, label="importance")
    ax.set_xlim(-0.6, len(experts) - 0.4)
    ax.axhline(1 / len(head.load), color="black", linestyle=":", linewidth=1, label="fair share")
    ax.set_ylabel("share", fontsize=SMALL)
    ax.tick_params(axis="y", labelsize=SMALL)
    ax.set_ylim(0, 1.35 * max(float(head.load.max()), float(head.importance.max())))
    for state, experts_in_state, marker in (("dead", head.dead_experts, "x"), ("starved", head.starved_experts, "|")):
        if many and experts_in_state:
            # labels would overlap
            zeros = [0.0] * len(experts_in_state)
            ax.plot(experts_in_state, zeros, marker, color="tab:red", markersize=5, label=state, clip_on=False)
        for expert in () if many else experts_in_state:
            ax.annotate(state, (expert, 0), ha="center", va="bottom", fontsize=7, color="tab:red", rotation=90)
    ax.legend(fontsize=7, ncols=5, loc="upper center", handlelength=1, columnspacing=0.8, frameon=False)
    label_numbers(ax, "x", len(head.load), "expert")
    ax.set_title(_title(name, head), fontsize=9)
    return figure, ax


def plot_classes(
    name: str, head: HeadUtilization, class_names: Sequence[str], ax: "Axes | None" = None
) -> "tuple[Figure, Axes]":
    """Draw the class map as a heat map: the share of the weight of a class (row) on an expert (column).

    Args:
        name: Name of the head.
        head: Its utilization, with a class map.
        class_names: Names of the classes.
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    assert head.class_map is not None
    height = max(CARD_HEIGHT, 0.14 * min(len(class_names), 50))
    figure, ax = axes_of(ax, (_width(len(head.load)), height))
    _draw_classes(ax, head.class_map, class_names)
    label_numbers(ax, "x", len(head.load), "expert")
    ax.set_title(_title(name, head), fontsize=9)
    return figure, ax


def plot_coactivation(name: str, coactivation: Tensor, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw a heat map of the share of the rows of one expert (row) that also chose another one (column).

    Args:
        name: Name of the head.
        coactivation: See `HeadUtilization.coactivation`, (E, E).
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    figure, ax = axes_of(ax, (_width(len(coactivation)), max(CARD_HEIGHT, 0.14 * min(len(coactivation), 50))))
    shares = coactivation.numpy().copy()
    np.fill_diagonal(shares, np.nan)
    _draw_shares(ax, shares, "share of the rows")
    label_numbers(ax, "x", len(coactivation), "also expert")
    label_numbers(ax, "y", len(coactivation), "rows of expert")
    ax.set_title(f"{plain_text(name, 30)}: experts chosen together", fontsize=9)
    return figure, ax


def plot_load_history(history: Mapping[int, RoutingStats], ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Draw the load of each expert over the epochs. A vanishing bar (or row) is a dying expert.

    Up to 16 experts are drawn as stacked shares, and more of them as a heat map in units of the fair share.

    Args:
        history: Statistics by epoch. A missing epoch stays empty.
        ax: Axes to draw on. The default is a new figure.

    Returns:
        Figure and axes.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    epochs = range(min(history), max(history) + 1)
    missing = torch.full_like(next(iter(history.values())).load, math.nan)
    load = torch.stack([history[e].load if e in history else missing for e in epochs]).double().cpu()
    num_experts = load.shape[1]
    many = num_experts > _MAX_BARS
    figure, ax = axes_of(ax, (4.4, map_height(num_experts) if many else CARD_HEIGHT))
    ax.set_title("load of the experts over training", fontsize=9)
    if many:
        draw_map(ax, (num_experts * load.t()).numpy(), "load / fair share", 2, extend="max", left=epochs[0])
        label_numbers(ax, "y", num_experts, "expert")
    else:
        bottom = torch.zeros(len(epochs), dtype=torch.float64)
        colors = matplotlib.colormaps["tab10" if num_experts <= 10 else "tab20"]
        for expert in range(num_experts):
            color, label = colors(expert), f"expert {expert}"
            ax.bar(epochs, load[:, expert], bottom=bottom, width=1.0, color=color, label=label)
            bottom += load[:, expert]
        ax.set(xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), ylim=(0, 1))
        ax.set_ylabel("share of the choices", fontsize=SMALL)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, labelspacing=0.2, frameon=False)
    ax.set_xlabel("epoch", fontsize=SMALL)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(labelsize=SMALL)
    return figure, ax


def _width(num_experts: int) -> float:
    """Return the width of a figure in inches, with a minimum of 450 pixels in TensorBoard."""
    return min(max(4.4, 1.6 + 0.28 * num_experts), 7)


def _title(name: str, head: HeadUtilization) -> str:
    title = f"{plain_text(name, 30)}: {head.effective_experts:.1f} effective experts of {len(head.load)}"
    if head.mutual_information is None:
        return title
    title += f"\nI(class; expert) {head.mutual_information:.2f}"
    chance = head.mutual_information_by_chance
    return title + (" nats" if chance is None else f" nats, by chance {chance:.2f}")


def _draw_classes(ax: "Axes", class_map: Tensor, class_names: Sequence[str]) -> None:
    _draw_shares(ax, class_map.numpy(), "share of the weight")
    step = 1 + (len(class_names) - 1) // 50
    names = [plain_text(name, _MAX_NAME) for name in class_names[::step]]
    ax.set_yticks(range(0, len(class_names), step), names, fontsize=SMALL)
    ax.set_ylabel("class", fontsize=SMALL)


def _draw_shares(ax: "Axes", values: np.ndarray, label: str) -> None:
    shares = np.ma.masked_invalid(values)
    largest = max(float(shares.max()) if shares.count() else 0.0, 1e-3)
    draw_map(ax, 100 * shares, f"{label} (%)", 100 * largest)
    if shares.size <= _MAX_LABELED_CELLS and shares.shape[1] <= _MAX_LABELED_EXPERTS:
        for (row, column), share in np.ndenumerate(shares):
            if share is not np.ma.masked and share >= _MIN_LABELED:
                color = "white" if share < 0.6 * largest else "black"
                ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
