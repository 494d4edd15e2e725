"""Axes for plots. New figures are created without pyplot, so that pyplot keeps no reference to them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["axes_of", "plain_text"]


def axes_of(ax: "Axes | None", size: tuple[float, float] = (6.0, 4.0)) -> "tuple[Figure, Axes]":
    """Return the figure and axes to draw on.

    Args:
        ax: Axes of the caller, or None for a new figure.
        size: Size of the new figure in inches.

    Returns:
        The figure that holds the axes, and the axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=size, layout="constrained").subplots()
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure, ax


def plain_text(text: str, length: int) -> str:
    """Prepare a user's text for a figure: join lines, truncate to ``length``, and escape dollar signs."""
    line = " ".join(text.split())
    return (line if len(line) <= length else line[: length - 1] + "…").replace("$", r"\$")
