"""Summary of the experts over the layers of a model: a bounded number of numbers, and the layers to look at.

Shapes: E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.head_utilization import (
    Detail,
    HeadUtilization,
    dead_and_starved,
    relative_load_percentiles,
)
from moe_heads.routing import RoutingStats

__all__ = ["LEVELS", "Layer", "level_of", "summarize_layers", "training_numbers", "worst_first"]

_BALANCE = ("worst", "median", "best")

LEVELS: dict[str, Sequence[str]] = {
    "load_cv": _BALANCE,
    "max_violation": _BALANCE,
    "relative_effective_experts": _BALANCE,
    "dropped": ("worst",),
    "nonfinite": ("worst",),
    "relative_entropy": ("lowest", "median", "highest"),
    "routing_flips": ("median", "highest"),
    "mutual_information": ("median",),
}
"""Levels over the layers at which each measure is logged. Neither a low nor a high entropy is worse by itself."""

_WORST_IS_SMALLEST = ("relative_effective_experts",)


@dataclass(frozen=True, eq=False)
class Layer:
    """Experts of one layer with a router.

    Attributes:
        relative: Share of each expert in units of the fair share 1/E, (E,), float64: of the load, or of the mixing
            weight for a soft router. nan without a row.
        dead: Dead experts.
        starved: Starved experts.
        numbers: Numbers by the name under which they are logged for one layer. Unknown ones are nan or missing.
    """

    relative: Tensor
    dead: tuple[int, ...]
    starved: tuple[int, ...]
    numbers: Mapping[str, float]

    @classmethod
    def of_head(cls, head: HeadUtilization) -> "Layer":
        """Return the layer of an analyzed head."""
        share = head.importance if head.soft else head.load
        return cls(share * len(share), head.dead_experts, head.starved_experts, head.metrics())

    @classmethod
    def of_stats(
        cls, stats: RoutingStats, soft: bool, dead_below: float, starved_below: float, numbers: Mapping[str, float]
    ) -> "Layer":
        """Return the layer of statistics of training batches.

        Args:
            stats: The statistics.
            soft: Whether the router mixes all experts.
            dead_below: Fraction of the fair share below which an expert is dead.
            starved_below: Fraction of the fair share below which it is starved.
            numbers: See `Layer`.
        """
        share = (stats.importance if soft else stats.load).double().cpu()
        relative = share * len(share)
        if not int(stats.num_rows):
            return cls(torch.full_like(relative, math.nan), (), (), numbers)
        return cls(relative, *dead_and_starved(relative.tolist(), dead_below, starved_below), numbers)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.relative)

    @property
    def measures(self) -> dict[str, float]:
        """Numbers that can be compared between layers. Unknown ones are nan or missing.

        They are those of ``numbers``, ``relative_effective_experts`` (effective experts / E) and ``relative_entropy``
        (entropy / log E).
        """
        found = dict(self.numbers)
        if "effective_experts" in found:
            found["relative_effective_experts"] = found["effective_experts"] / self.num_experts
        if "entropy" in found and self.num_experts > 1:
            found["relative_entropy"] = found["entropy"] / math.log(self.num_experts)
        return found


def summarize_layers(layers: Mapping[str, Layer]) -> dict[str, float]:
    """Compute the numbers to log in place of those of each layer, ``<measure>/<level>``, and the numbers of experts.

    Layers in which a number is unknown are left out of its levels. If no row of any layer could be counted, the levels
    are nan, as the numbers of a single layer are.

    Args:
        layers: The layers by name, at least one.
    """
    found: dict[str, float] = {}
    columns = [layer.measures for layer in layers.values()]
    for measure, levels in LEVELS.items():
        present = [numbers[measure] for numbers in columns if measure in numbers]
        if present:
            values = [value for value in present if math.isfinite(value)] or [math.nan]
            found |= {f"{measure}/{level}": level_of(measure, values, level) for level in levels}
    counted = [layer for layer in layers.values() if not layer.relative.isnan().any()]
    if counted:
        found["num_dead_experts"] = float(sum(len(layer.dead) for layer in counted))
        found["num_starved_experts"] = float(sum(len(layer.starved) for layer in counted))
        found["num_layers_with_dead_experts"] = float(sum(bool(layer.dead) for layer in counted))
    return found


def training_numbers(layers: Mapping[str, Layer], detail: Detail, has_several: bool) -> dict[str, float]:
    """Return the numbers of a training epoch to log, ``<head>/<quantity>`` or ``<measure>/<level>``.

    Args:
        layers: The layers that ran, by name.
        detail: "full" for all numbers of every layer. "summary" for `summarize_layers` and ``relative_load/p<level>``,
            the percentiles of the load over the experts of all layers. For a model with one layer "summary" leaves out
            the importance of each expert, and the percentiles where the load of each expert is logged.
        has_several: Whether the model has several layers, also if not all of them ran.
    """
    if detail == "summary" and has_several:
        return summarize_layers(layers) | _relative_load_of_all(layers)
    return {
        f"{name}/{key}": value
        for name, layer in layers.items()
        for key, value in (layer.numbers if detail == "full" else _without_details(layer.numbers)).items()
    }


def _without_details(numbers: Mapping[str, float]) -> dict[str, float]:
    left_out = ("importance_", "relative_load_p") if "load_0" in numbers else ("importance_",)
    return {key: value for key, value in numbers.items() if not key.startswith(left_out)}


def _relative_load_of_all(layers: Mapping[str, Layer]) -> dict[str, float]:
    counted = [layer.relative for layer in layers.values() if not layer.relative.isnan().any()]
    loads = torch.cat(counted) if counted else torch.tensor([math.nan])
    return {key.replace("load_", "load/"): value for key, value in relative_load_percentiles(loads).items()}


def worst_first(layers: Mapping[str, Layer]) -> list[str]:
    """Sort the layers by the fraction of their experts that is dead, and by their relative effective experts."""

    def health(name: str) -> tuple[float, float]:
        layer = layers[name]
        effective = layer.measures.get("relative_effective_experts", math.nan)
        return -len(layer.dead) / layer.num_experts, math.inf if math.isnan(effective) else effective

    return sorted(layers, key=health)


def level_of(measure: str, values: Sequence[float], level: str) -> float:
    """Return a level of finite values of a measure: "worst", "median", "best", "lowest" or "highest"."""
    if level == "median":
        return median(values)
    worst_is_smallest = measure in _WORST_IS_SMALLEST
    take_smallest = {"lowest": True, "highest": False, "worst": worst_is_smallest, "best": not worst_is_smallest}
    return min(values) if take_smallest[level] else max(values)
