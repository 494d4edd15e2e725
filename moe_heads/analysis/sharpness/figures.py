"""Figures of the spectrum of a Hessian, its blocks and its history."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.analysis._shared.figures import axes_of
from moe_heads.analysis.sharpness.block import BlockCurvature
from moe_heads.analysis.sharpness.hessian.both_ends import Which
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_blocks", "plot_history", "plot_spectrum"]


def plot_spectrum(
    eigenvalues: Sequence[float],
    density: SpectralDensity | None,
    ax: "Axes | None" = None,
    *,
    matrix: str = "Hessian",
    which: Which = "largest",
) -> "tuple[Figure, Axes]":
    """Plot the density of the eigenvalues on a logarithmic axis and mark the largest ones.

    Args:
        eigenvalues: The largest eigenvalues, descending.
        density: Density of all eigenvalues; None to draw only the marks.
        ax: Axes to draw into; by default those of a new figure outside pyplot.
        matrix: Name of the matrix.
        which: The selected eigenvalues.

    Returns:
        The figure and the axes.
    """
    figure, ax = axes_of(ax)
    if density is not None:
        grid, values, error = density.grid.numpy(), density.values.numpy(), 2 * density.stderr.numpy()
        # The lowest visible value is the bump of a single eigenvalue. Below it are only the tails of the Gaussians.
        faintest = float(density.weights[density.weights > 1e-12].min()) / (density.sigma * math.sqrt(2 * math.pi))
        bottom, top = faintest / 3, 3 * float(values.max())
        lower, upper = np.clip(values - error, bottom, None), np.clip(values + error, bottom, None)
        ax.fill_between(grid, lower, upper, alpha=0.3, linewidth=0, label="± 2 standard errors")
        ax.plot(grid, values, label=f"density, Gaussians of width {density.sigma:.2g}")
        ax.set_yscale("log")
        ax.set_ylim(bottom, top)
        ax.set_ylabel("density")
    else:
        ax.set_yticks([])
    # Axis coordinates put the marks on the lower edge for every vertical scale.
    ax.plot(
        list(eigenvalues),
        [0.0] * len(eigenvalues),
        transform=ax.get_xaxis_transform(),
        linestyle="none",
        marker="^",
        markersize=9,
        color="tab:red",
        clip_on=False,
        label=f"top {len(eigenvalues)} eigenvalues",
    )
    ax.set_xlabel(f"eigenvalue of the {matrix}")
    title = "largest eigenvalue" if which == "largest" else "eigenvalue of largest magnitude"
    ax.set_title(f"{title} {eigenvalues[0]:.4g}")
    ax.legend()
    return figure, ax


def plot_blocks(blocks: Mapping[str, BlockCurvature], experts: Mapping[str, BlockCurvature]) -> "Figure":
    """Plot the trace of each block and expert with two standard errors, and the shares of the eigenvectors.

    Without any trace, the figure shows the shares alone.

    Args:
        blocks: Curvature by block.
        experts: Curvature by expert; may be empty.
    """
    from matplotlib.figure import Figure

    has_trace = any(math.isfinite(block.trace) for block in blocks.values())
    rows = [len(blocks), len(experts)] if experts and has_trace else [len(blocks)]
    figure = Figure(figsize=(6.4, max(3.4, 0.26 * sum(rows) + 1.8)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 1 + has_trace, height_ratios=rows)
    colors = {name: f"C{index % 9}" for index, name in enumerate(blocks)}
    if has_trace:
        left = figure.add_subplot(grid[0, 0])
        left.set_title("trace of each block")
        _draw_traces(left, blocks, [colors[name] for name in blocks])
        if experts:
            # A separate axis, because next to a backbone the bars would be too short to see.
            left = figure.add_subplot(grid[1, 0])
            _draw_traces(left, experts, ["gray"] * len(experts))
        left.set_xlabel("± 2 standard errors")
    right = figure.add_subplot(grid[:, -1])
    num_shares = max(len(block.shares) for block in blocks.values())
    ranks, heights = range(1, num_shares + 1), [0.0] * num_shares
    for name, block in blocks.items():
        right.bar(ranks, block.shares, bottom=heights, label=name, color=colors[name])
        heights = [height + share for height, share in zip(heights, block.shares, strict=True)]
    right.set_xticks(list(ranks), [f"v{rank}" for rank in ranks])
    right.set_ylabel("share of the squared norm")
    right.set_ylim(0, 1.02)
    right.set_title("top eigenvectors")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=min(len(blocks), 4))
    return figure


def _draw_traces(ax: "Axes", blocks: Mapping[str, BlockCurvature], colors: Sequence[str]) -> None:
    traces = [block.trace if math.isfinite(block.trace) else 0.0 for block in blocks.values()]
    errors = [2 * block.trace_stderr if math.isfinite(block.trace_stderr) else 0.0 for block in blocks.values()]
    places = range(len(blocks))
    ax.barh(places, traces, xerr=errors, color=colors, capsize=3)
    ax.set_yticks(places, list(blocks))
    ax.invert_yaxis()


def plot_history(history: Mapping[int, tuple[float, float | None]]) -> "Figure":
    """Plot the largest eigenvalue over the epochs, with the value above which the optimizer's steps are unstable.

    Args:
        history: The largest eigenvalue and the stability threshold (None if unknown) by epoch.
    """
    from matplotlib.ticker import MaxNLocator

    figure, ax = axes_of(None)
    epochs, values = list(history), [value for value, _ in history.values()]
    ax.plot(epochs, values, marker=".", label="largest eigenvalue")
    thresholds = [math.nan if threshold is None else threshold for _, threshold in history.values()]
    if any(map(math.isfinite, thresholds)):
        ax.plot(epochs, thresholds, linestyle="--", color="tab:red", label="stability threshold")
    if min(values) > 0:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel("eigenvalue of the Hessian")
    ax.set_title("sharpness during training")
    ax.legend()
    return figure
