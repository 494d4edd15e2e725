"""Figure of the sharpness over the steps of a training, against the stability thresholds, with the loss."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Series", "plot_steps"]

Series = Mapping[int, Mapping[str, float]]
"""Numbers by name and step, such as ``callback.tracked_steps["train"]``."""

# Key, label, color and line style of each series of eigenvalues and of critical sharpness.
_OF_SHARPNESS = (
    ("lambda_max", "largest eigenvalue", "C0", "-"),
    ("stability_threshold", "its threshold", "C0", "--"),
    ("preconditioned_lambda_max", "preconditioned largest eigenvalue", "C2", "-"),
    ("preconditioned_threshold", "its threshold", "C2", "--"),
)
_OF_STEPS = (("lambda_c", "critical sharpness", "C1", "-"), ("threshold", "its threshold 2/η", "C1", "--"))


def plot_steps(sharpness: Series, critical: Series) -> "Figure":
    """Plot sharpness and critical sharpness over the steps of a training, with their thresholds, and the loss below.

    Args:
        sharpness: ``tracked_steps["train"]`` of a `SharpnessCallback`; empty for none.
        critical: ``tracked_steps["train"]`` of a `CriticalSharpnessCallback`; empty for none.

    Returns:
        The figure. Its lower part shows the loss of the batches of ``critical``, and without them that of
        ``sharpness``.

    Raises:
        ValueError: If both are empty.

    Example:
        >>> from moe_heads.analysis.critical_sharpness.figures import plot_steps
        >>> figure = plot_steps({}, {10: {"lambda_c": 3.0, "threshold": 20.0, "loss": 0.7}})
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['sharpness', 'loss']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not sharpness and not critical:
        raise ValueError("sharpness, critical: expected points of at least one of them, got none.")
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for points, series in ((sharpness, _OF_SHARPNESS), (critical, _OF_STEPS)):
        for key, label, color, style in series:
            _draw(upper, points, key, label=label, color=color, linestyle=style, marker="." if style == "-" else None)
    values = [value for line in upper.lines for value in line.get_ydata() if math.isfinite(value)]
    if values and min(values) > 0:
        upper.set_yscale("log")
    if upper.lines:
        upper.legend()
    upper.set_ylabel("sharpness")
    upper.set_title("sharpness during training")
    if critical:
        _draw(lower, critical, "loss", color="C3")
    else:
        _draw(lower, sharpness, "center_loss", color="C3")
    lower.set_ylabel("loss")
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw(ax: "Axes", points: Series, key: str, **style: object) -> None:
    """Draw one series, with a gap where it is unknown; nothing if it has no point."""
    if any(key in point for point in points.values()):
        steps = sorted(points)
        ax.plot(steps, [points[step].get(key, math.nan) for step in steps], **style)  # type: ignore[arg-type]
