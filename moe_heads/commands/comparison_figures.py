"""Figures of a comparison: spectra of several runs, and losses along lines."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.commands.barriers import Barrier
from moe_heads.commands.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_barriers", "plot_spectra", "rendered"]

# Below the lower edge of every logarithmic axis.
_TINY = 1e-300


def plot_spectra(runs: Sequence[Run], split: str) -> "Figure | None":
    """Plot the spectral densities and largest eigenvalues of all runs on one axis; None if fewer than two have them."""
    paths = [(run.label, run.folder / "sharpness" / split / "spectrum.npz") for run in runs]
    there = [(label, path) for label, path in paths if path.is_file()]
    if len(there) < 2:
        return None
    figure, ax = axes_of(None)
    floors, tops = [], []
    for place, (label, path) in enumerate(there):
        color = f"C{place % 10}"
        with np.load(path) as arrays:
            if "grid" in arrays:
                values, weights = arrays["values"], arrays["weights"]
                floor = weights[weights > 1e-12].min() / (arrays["sigma"] * np.sqrt(2 * np.pi)) / 3
                floors.append(floor)
                tops.append(values.max())
                error = 2 * arrays["stderr"]
                low, high = np.clip([values - error, values + error], _TINY, None)
                ax.fill_between(arrays["grid"], low, high, alpha=0.2, linewidth=0, color=color)
                ax.plot(arrays["grid"], np.clip(values, _TINY, None), color=color, label=label)
            eigenvalues = arrays["eigenvalues"]
            ax.plot(
                eigenvalues,
                np.zeros(len(eigenvalues)) + 0.03 * place,
                transform=ax.get_xaxis_transform(),
                linestyle="none",
                marker="^",
                color=color,
                clip_on=False,
                label=None if "grid" in arrays else label,
            )
    if floors:
        ax.set_yscale("log")
        ax.set_ylim(min(floors), 3 * max(tops))
        ax.set_ylabel("density")
    else:
        ax.set_yticks([])
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_title(f"spectra, {split} data (bands: ± 2 standard errors, ▲: largest eigenvalues)", fontsize=10)
    ax.legend()
    return figure


def plot_barriers(barriers: Sequence[Barrier]) -> "Figure | None":
    """Plot the loss along the line of each pair before and after matching; None without a barrier."""
    from matplotlib.figure import Figure

    found = [barrier for barrier in barriers if barrier.before is not None and barrier.after is not None]
    if not found:
        return None
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.4 * rows), layout="constrained")
    for place, barrier in enumerate(found, start=1):
        assert barrier.before is not None and barrier.after is not None
        ax = figure.add_subplot(rows, columns, place)
        before, after = barrier.before, barrier.after
        ax.plot(before.positions, before.losses, marker=".", label=f"before matching: {before.barrier:.3g}")
        ax.plot(after.positions, after.losses, marker=".", label=f"after matching: {after.barrier:.3g}")
        ends = before.losses[0], before.losses[-1]
        ax.plot([0, 1], ends, linestyle=":", color="gray", label="straight line between the ends")
        ax.set_xlabel(f"0: {barrier.first}, 1: {barrier.second}")
        ax.set_ylabel("mean loss")
        ax.set_title(f"{barrier.first} to {barrier.second}, {barrier.split} data", fontsize=10)
        ax.legend(fontsize=8, title="barrier", title_fontsize=8)
    return figure


def rendered(figure: "Figure", kind: str) -> bytes:
    """Return a figure as "png" or "svg"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
