"""Cost of the points of a series, as metrics and as text."""

from collections.abc import Collection, Mapping

__all__ = ["cost_lines", "cost_metrics"]

Costs = Mapping[str, Collection[float]]
"""Cost of each point, by its unit, such as products or seconds."""


def cost_metrics(costs: Costs, overhead: float) -> dict[str, float]:
    """Return mean, smallest and largest cost of a point by unit, and the overhead.

    Args:
        costs: The costs.
        overhead: Seconds of all points over those of the training without them.

    Example:
        >>> from moe_heads.callbacks._shared.cost_report import cost_metrics
        >>> cost_metrics({"products": [12.0, 16.0]}, 0.02)
        {'products_mean': 14.0, 'products_min': 12.0, 'products_max': 16.0, 'overhead': 0.02}
    """
    found: dict[str, float] = {}
    for unit, values in costs.items():
        if values:
            found |= {f"{unit}_mean": sum(values) / len(values)}
            found |= {f"{unit}_min": min(values), f"{unit}_max": max(values)}
    return found | {"overhead": overhead}


def cost_lines(costs: Costs, overhead: float, *, every: int | None, max_overhead: float | None) -> list[str]:
    """Return the number of points and their cost, as items of a list in Markdown.

    Args:
        costs: The costs.
        overhead: Seconds of all points over those of the training without them.
        every: Number of steps between two points, None if the clock chose them.
        max_overhead: The largest overhead that was allowed, if there was one.
    """
    count = max(map(len, costs.values()), default=0)
    chosen = f"one every {every} steps" if every is not None else "at steps chosen by the clock"
    lines = [f"- {count} points, {chosen}"]
    for unit, values in costs.items():
        if values:
            mean = sum(values) / len(values)
            lines.append(f"- {mean:.3g} {unit} a point ({min(values):.3g} to {max(values):.3g})")
    allowed = "" if max_overhead is None else f", allowed are {100 * max_overhead:g} %"
    lines.append(f"- {100 * overhead:.3g} % more time than the training without the points{allowed}")
    return lines
