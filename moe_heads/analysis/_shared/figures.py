"""Axes to draw on: the caller's, or those of a new figure that pyplot does not know and so never leaks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["axes_of", "plain_text"]


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


def plain_text(text: str, length: int) -> str:
    """A user's text for a figure: one line, cut to a length, its dollars no mathematics."""
    line = " ".join(text.split())
    return (line if len(line) <= length else line[: length - 1] + "…").replace("$", r"\$")
