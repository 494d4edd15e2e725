"""Points of the sharpness along the steps of a training: their expected cost, and the report at the end."""

from collections.abc import Mapping

from moe_heads.analysis.critical_sharpness.figures import plot_steps
from moe_heads.callbacks._shared.cost_report import cost_lines, cost_metrics
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["expected_gradients", "report_of_steps"]

# Products of a point apart from those for its eigenvalues and its probes: the search for missing eigenvalues, the
# true residual, and the checks in units of these. Measured on small networks; see docs/sharpness.md.
_PRODUCTS, _PRODUCTS_EACH = 20, 4

# Gradients that take the time of one product.
_GRADIENTS_A_PRODUCT = 2.3


def expected_gradients(num_eigenvalues: int, num_probes: int) -> float:
    """Return the expected cost of a point, in gradients over its samples."""
    return _GRADIENTS_A_PRODUCT * (_PRODUCTS + _PRODUCTS_EACH * num_eigenvalues + num_probes)


def report_of_steps(
    tracked: Mapping[Split, Mapping[int, Mapping[str, float]]],
    seconds: Mapping[int, float],
    overhead: float,
    *,
    every: int | None,
    max_overhead: float | None,
) -> Report:
    """Return the figure over the steps, and the cost of a point, as metrics and as text.

    Args:
        tracked: Metrics by split and step.
        seconds: Seconds by step.
        overhead: Seconds of all points over those of the training without them.
        every: Number of steps between two points, None if the clock chose them.
        max_overhead: The largest overhead that was allowed, if there was one.
    """
    points = [point for series in tracked.values() for point in series.values()]
    costs = {
        "products": [point["num_products"] for point in points if "num_products" in point],
        "seconds": list(seconds.values()),
    }
    lines = cost_lines(costs, overhead, every=every, max_overhead=max_overhead)
    series = tracked.get("train") or next(iter(tracked.values()))
    return Report(cost_metrics(costs, overhead), {"summary": "\n".join(lines)}, {"tracking": plot_steps(series, {})})
