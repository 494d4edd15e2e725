"""Groups of units that can trade places, from the axes of the tensors of a network."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

from moe_heads.analysis.weight_matching.unit_group import Positions, UnitGroup
from moe_heads.analysis.weight_matching.units import FIXED, Axes

__all__ = ["unit_groups"]

Place = tuple[str, int]
"""Name of a tensor, and one of its dimensions."""


def unit_groups(axes: Mapping[str, Axes]) -> list[UnitGroup]:
    """Return the groups of units with the same number of positions in every dimension of every tensor.

    Args:
        axes: Representatives of the units along each dimension, by name of the tensor.
    """
    where: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, dims in axes.items():
        for dim, axis in enumerate(dims):
            for place, unit in enumerate(axis.tolist()):
                if unit != FIXED:
                    where[unit][name, dim].append(place)
    alike: dict[tuple[tuple[Place, int], ...], list[int]] = defaultdict(list)
    for unit in sorted(where):
        alike[tuple((place, len(found)) for place, found in where[unit].items())].append(unit)
    groups = []
    for signature, units in alike.items():
        if len(units) > 1:
            places = {place: np.array([where[unit][place] for unit in units]) for place, _ in signature}
            positions = [Positions(name, dim, torch.from_numpy(found)) for (name, dim), found in places.items()]
            groups.append(UnitGroup(_name_of(places), min(units), tuple(positions)))
    return groups


def _name_of(places: Mapping[Place, object]) -> str:
    """Return the name of the first tensor whose outputs are the units."""
    first = next((name for name, dim in places if dim == 0), next(iter(places))[0])
    return first.rpartition(".")[0] or first
