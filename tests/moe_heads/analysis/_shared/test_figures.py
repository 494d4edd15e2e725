"""Axes of the caller or of a new figure."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from moe_heads.analysis._shared.figures import axes_of


def test_a_new_figure_is_unknown_to_pyplot() -> None:
    figure, ax = axes_of(None, (3, 2))
    assert ax.get_figure() is figure
    assert tuple(figure.get_size_inches()) == (3, 2)
    assert plt.get_fignums() == []


def test_axes_of_the_caller_are_used_also_in_a_subfigure() -> None:
    root = Figure()
    ax = root.subfigures(1, 2)[0].subplots()
    assert axes_of(ax) == (root, ax)
