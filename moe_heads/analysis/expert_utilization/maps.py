"""Heat maps with one row per layer, expert or class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_heads.analysis._shared.figures import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap

__all__ = ["CARD_HEIGHT", "SMALL", "draw_map", "label_layers", "label_numbers", "map_height", "map_width"]

# Inches. A card of TensorBoard has a height of 210 pixels and scales higher figures down.
CARD_HEIGHT = 2.3

# Font size of the labels.
SMALL = 8

# Largest number of labeled rows, and of characters of a label.
_MAX_ROWS, _MAX_NAME = 50, 24


def draw_map(
    ax: "Axes",
    values: np.ndarray,
    label: str,
    largest: float,
    colors: "str | Colormap" = "viridis",
    extend: Literal["neither", "both", "max"] = "neither",
    left: int = 0,
) -> "Colorbar":
    """Draw values from 0 on as colors, with a color bar. Unknown values (nan) are hatched.

    Args:
        ax: Axes to draw on.
        values: The values, one row from top to bottom for each row of the map.
        label: Label of the color bar.
        largest: Value of the last color.
        colors: Colormap.
        extend: Ends of the color bar that are open because there are values beyond them.
        left: Number of the first column.

    Returns:
        The color bar.
    """
    ax.patch.set(hatch="///", facecolor="white", edgecolor="0.7")
    image = ax.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        cmap=colors,
        vmin=0,
        vmax=largest,
        interpolation="nearest",
        extent=(left - 0.5, left + values.shape[1] - 0.5, len(values) - 0.5, -0.5),
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, extend=extend)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def map_width(num_columns: int) -> float:
    """Return the width of a map in inches. The minimum has 440 pixels in TensorBoard."""
    return max(4.4, min(1.8 + 0.2 * num_columns, 7.5))


def map_height(num_rows: int) -> float:
    """Return the height of a map in inches, enough for a label on each of 50 rows."""
    return max(CARD_HEIGHT, 0.9 + 0.13 * min(num_rows, _MAX_ROWS))


def label_numbers(ax: "Axes", axis: Literal["x", "y"], count: int, title: str) -> None:
    """Label the columns or rows of a map by their numbers, at most 16 of them."""
    shown = range(0, count, 1 + (count - 1) // 16)
    set_ticks, set_title = (ax.set_xticks, ax.set_xlabel) if axis == "x" else (ax.set_yticks, ax.set_ylabel)
    set_ticks(shown, [str(number) for number in shown], fontsize=SMALL)
    set_title(title, fontsize=SMALL)


def label_layers(ax: "Axes", names: Sequence[str]) -> None:
    """Label the rows of a map by the parts of the names in which the layers differ."""
    labels, pattern = short_names(names)
    shown = range(0, len(names), 1 + (len(names) - 1) // _MAX_ROWS)
    size = SMALL if len(names) <= 16 else 6
    ax.set_yticks(shown, [plain_text(labels[row], _MAX_NAME) for row in shown], fontsize=size)
    ax.set_ylabel(plain_text(pattern or "layer", 2 * _MAX_NAME), fontsize=SMALL)


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Shorten the names of layers to the parts in which they differ.

    Args:
        names: Names of modules, such as "layers.0.mlp.gate" and "layers.1.mlp.gate".

    Returns:
        The short names, "0" and "1", and the pattern "layers.*.mlp.gate", which is "" if they have nothing in common.
    """
    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1
    start = _num_equal(parts, most)
    end = _num_equal([part[::-1] for part in parts], most - start)
    if len(names) < 2 or start + end == 0:
        return list(names), ""
    kept = [".".join(part[start : len(part) - end]) for part in parts]
    return kept, ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - end :]])


def _num_equal(parts: Sequence[Sequence[str]], most: int) -> int:
    """Return how many leading parts are the same in all names, at most ``most``."""
    return next((i for i in range(most) if len({part[i] for part in parts}) > 1), most)
