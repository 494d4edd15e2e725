"""One figure for each claim, with a point for each seed and a color for each head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_heads.analysis.inference_timing.figures import PART_COLORS
from study import quantities as q
from study.parts_over_dense import PartsOverDense, parts_over_dense
from study.presets import HEADS
from study.quantities import Quantity
from study.results import Run, heads_of
from study.statistics import estimate, values_of

_SIZE = 8

FIGURES = ("accuracy", "utilization", "sharpness", "generalization", "landscape", "speed")
"""Names of the figures."""


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """Draw the figures of the claims by name, without those that have no numbers."""
    present = heads_of(runs)
    drawn: dict[str, Callable[[], Figure | None]] = {
        "accuracy": lambda: _panels(runs, present, (q.ACCURACY, q.VAL_ACCURACY)),
        "utilization": lambda: _loads(runs, present),
        "sharpness": lambda: _panels(runs, present, (q.LAMBDA_TRAIN, q.LAMBDA_TEST, q.TRACE_TRAIN, q.TRACE_TEST)),
        "generalization": lambda: _gaps(runs, present),
        "landscape": lambda: _lines(runs, present),
        "speed": lambda: _speed(runs, [head for head in present if head != "dense"]),
    }
    made = {name: draw() for name, draw in drawn.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def color(head: str) -> str:
    """Return the color of a head, the same in every figure of a study."""
    return f"C{HEADS.index(head)}"


def _panels(runs: Sequence[Run], heads: Sequence[str], wanted: Sequence[Quantity]) -> Figure | None:
    """Draw one panel for each quantity: all seeds, and the mean with its interval."""
    present = [quantity for quantity in wanted if any(values_of(runs, quantity, head) for head in heads)]
    if not present:
        return None
    figure = Figure(figsize=(2.6 * len(present) + 0.4, 2.7), layout="constrained")
    for ax, quantity in zip(np.ravel(figure.subplots(1, len(present))), present, strict=True):
        _draw_panel(ax, runs, heads, quantity)
    return figure


def _draw_panel(ax: Any, runs: Sequence[Run], heads: Sequence[str], quantity: Quantity) -> None:
    for position, head in enumerate(heads):
        values = list(values_of(runs, quantity, head).values())
        found = estimate(values, quantity.is_ratio)
        if found is None:
            continue
        points = quantity.scale * np.array(values)
        ax.plot(np.full(len(points), position + 0.15), points, ".", color=color(head), alpha=0.6, markersize=4)
        mean = quantity.scale * found.mean
        error = None
        if found.low is not None and found.high is not None:
            error = [[mean - quantity.scale * found.low], [quantity.scale * found.high - mean]]
        ax.errorbar([position - 0.1], [mean], yerr=error, fmt="o", color=color(head), capsize=3, markersize=4)
    if quantity.is_ratio and quantity in (q.HEAD_SPEEDUP, q.SPEEDUP):
        ax.axhline(1, color="gray", linewidth=0.8)
    if quantity.is_ratio:
        _log_where_wide(ax)
    ax.set_xticks(range(len(heads)), heads, fontsize=_SIZE)
    ax.set_xlim(-0.5, len(heads) - 0.5)
    _dress(ax, title=quantity.title.replace(" (", "\n("))


def _speed(runs: Sequence[Run], heads: Sequence[str]) -> Figure | None:
    """Draw the speedups of the head and of the model, and where the time of each head goes."""
    present = [quantity for quantity in (q.HEAD_SPEEDUP, q.SPEEDUP) if any(values_of(runs, quantity, h) for h in heads)]
    parts = {head: parts_over_dense(runs, head) for head in heads}
    if not present:
        return None
    panels = len(present) + any(parts.values())
    figure = Figure(figsize=(2.6 * panels + 0.8, 2.7), layout="constrained")
    axes = np.ravel(figure.subplots(1, panels))
    for ax, quantity in zip(axes, present, strict=False):
        _draw_panel(ax, runs, heads, quantity)
    if any(parts.values()):
        _draw_parts(axes[-1], parts)
    return figure


def _draw_parts(ax: Any, parts: Mapping[str, PartsOverDense | None]) -> None:
    """Draw a bar for each head with the means of its parts, and the theoretical time."""
    drawn: set[str] = set()
    for position, found in enumerate(parts.values()):
        if found is None:
            continue
        bottom = 0.0
        for part, share in found.parts.items():
            label = "" if part in drawn else part
            ax.bar(position, max(share, 0.0), bottom=bottom, color=PART_COLORS[part], width=0.6, label=label or None)
            bottom += max(share, 0.0)
            drawn.add(part)
        for name, value, marker in (("theoretical", found.theoretical, "^"), ("launches alone", found.launches, "x")):
            if value is not None:
                ax.plot(position, value, marker, color="0.1", markersize=4, label=None if name in drawn else name)
                drawn.add(name)
    ax.axhline(1, color="gray", linewidth=0.8)
    ax.set_xticks(range(len(parts)), list(parts), fontsize=_SIZE)
    _dress(ax, title="time of the head, dense = 1\n(B = 256)")
    ax.legend(fontsize=_SIZE - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _loads(runs: Sequence[Run], heads: Sequence[str]) -> Figure | None:
    """Draw the load of every expert on test data relative to 1/E, sorted, one line for each seed."""
    routed = [head for head in heads if any(run["head"] == head and run["loads"] for run in runs)]
    if not routed:
        return None
    figure = Figure(figsize=(2.6 * len(routed) + 0.4, 2.7), layout="constrained")
    axes = np.ravel(figure.subplots(1, len(routed), sharey=True))
    for ax, head in zip(axes, routed, strict=True):
        for run in runs:
            shares = sorted(q.shares_of_experts(run), reverse=True) if run["head"] == head else []
            if shares:
                ax.plot(range(1, len(shares) + 1), shares, ".-", color=color(head), linewidth=0.8, alpha=0.8)
        ax.axhline(1, color="gray", linewidth=0.8)
        ax.axhline(0.25, color="red", linewidth=0.8, linestyle=":")
        _dress(ax, title=head, xlabel="expert, sorted by load")
    axes[0].set_ylim(bottom=0)  # for all panels, after their lines: an earlier call would fix the upper limit
    axes[0].set_ylabel("load × E", fontsize=_SIZE)
    return figure


def _gaps(runs: Sequence[Run], heads: Sequence[str]) -> Figure | None:
    """Plot the generalization gap over each measure of sharpness, one point for each run."""
    wanted = (q.LAMBDA_TRAIN, q.TRACE_TRAIN, q.RADIUS)
    figure = Figure(figsize=(2.7 * len(wanted) + 0.4, 2.7), layout="constrained")
    drawn = 0
    for ax, quantity in zip(figure.subplots(1, len(wanted), sharey=True), wanted, strict=True):
        for head in heads:
            measures, gaps = values_of(runs, quantity, head), values_of(runs, q.GAP, head)
            seeds = sorted(set(measures) & set(gaps))
            drawn += len(seeds)
            xs, ys = [measures[seed] for seed in seeds], [gaps[seed] for seed in seeds]
            ax.plot(xs, ys, "o", color=color(head), markersize=4, label=head)
        _dress(ax, xlabel=quantity.title.replace(", ", ",\n"))
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("{x:.2g}")
        ax.tick_params(axis="x", which="both", labelsize=_SIZE - 2)
    figure.axes[0].set_ylabel("test − train loss, nats", fontsize=_SIZE)
    figure.axes[0].legend(fontsize=_SIZE - 1)
    return figure if drawn else None


def _lines(runs: Sequence[Run], heads: Sequence[str]) -> Figure | None:
    """Plot the loss along the top eigenvector by split (rows) and head (columns), dashed for fixed routing.

    The sign of an eigenvector is arbitrary: every line is oriented so that its higher end is on the right.
    """
    splits = [split for split in ("train", "test") if any(split in run["lines"] for run in runs)]
    drawn = [head for head in heads if any(run["head"] == head and run["lines"] for run in runs)]
    if not splits or not drawn:
        return None
    figure = Figure(figsize=(2 * len(drawn) + 0.6, 2 * len(splits) + 0.6), layout="constrained")
    axes = figure.subplots(len(splits), len(drawn), sharex=True, sharey=True, squeeze=False)
    for row, split in zip(axes, splits, strict=True):
        for ax, head in zip(row, drawn, strict=True):
            for run in runs:
                if run["head"] == head and split in run["lines"]:
                    _line(ax, run["lines"][split], color(head))
            _dress(ax, title=f"{head}, {split}", xlabel="α" if split == splits[-1] else "")
        row[0].set_ylabel("cross-entropy, nats", fontsize=_SIZE)
    _log_where_wide(axes[0, 0])
    return figure


def _line(ax: Any, line: Mapping[str, Sequence[float | None]], shade: str) -> None:
    losses = _floats(line["losses"])
    alphas = np.array(_floats(line["alphas"])) * (-1 if losses[0] > losses[-1] else 1)
    ax.plot(alphas, losses, color=shade, linewidth=0.9, alpha=0.8)
    if "losses_fixed_routing" in line:
        fixed = _floats(line["losses_fixed_routing"])
        ax.plot(alphas, fixed, color="black", linewidth=0.6, linestyle="--", alpha=0.6)


def _log_where_wide(ax: Any) -> None:
    limits = np.array([other.dataLim.intervaly for other in ax.get_shared_y_axes().get_siblings(ax)])
    low, high = limits.min(), limits.max()
    if low > 0 and high > 30 * low:
        ax.set_yscale("log")


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _dress(ax: Any, title: str = "", xlabel: str = "") -> None:
    ax.set_title(title, fontsize=_SIZE)
    ax.set_xlabel(xlabel, fontsize=_SIZE)
    ax.tick_params(labelsize=_SIZE - 1)
    ax.grid(alpha=0.3)
