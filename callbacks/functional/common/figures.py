"""Axes to draw on: the caller's, or those of a new figure that pyplot does not know and so never leaks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["axes_of"]


def axes_of(ax: "Axes | None", size: tuple[float, float] = (6.0, 4.0)) -> "tuple[Figure, Axes]":
    """Figure and axes to draw on.

    Args:
        ax: Axes of the caller; None for a new figure.
        size: Inches of the new figure.

    Returns:
        The figure that holds the axes, and the axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=size, layout="constrained").subplots()
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure, ax
