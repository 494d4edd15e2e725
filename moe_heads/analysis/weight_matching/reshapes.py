"""Axes of reshaped tensors.

A dimension of a reshaped tensor is a product or a factor of dimensions. Its axis is known where only one of the
dimensions of a product has units.
"""

import math
from collections.abc import Sequence

import numpy as np

from moe_heads.analysis.weight_matching.units import Axes, Axis, is_fixed

__all__ = ["reshaped"]


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return the axes after a reshape to ``shape``; None where a new dimension mixes several axes with units."""
    found: list[Axis] = []
    for olds, news in _blocks([len(axis) for axis in axes], list(shape)):
        merged = _product([axes[place] for place in olds])
        if merged is None:
            return None
        factors = _factors(merged, [shape[place] for place in news])
        if factors is None:
            return None
        found += factors
    return tuple(found)


def _blocks(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of neighboring dimensions with equal products, as places in ``old`` and ``new``."""
    blocks = []
    left, right = 0, 0
    while left < len(old) or right < len(new):
        olds, news = [], []
        size_old = size_new = 1
        if left < len(old):
            olds, size_old, left = [left], old[left], left + 1
        if right < len(new):
            news, size_new, right = [right], new[right], right + 1
        while size_old != size_new:
            if size_old < size_new:
                olds.append(left)
                size_old, left = size_old * old[left], left + 1
            else:
                news.append(right)
                size_new, right = size_new * new[right], right + 1
        blocks.append((olds, news))
    return blocks


def _product(axes: Sequence[Axis]) -> Axis | None:
    """Return the axis of the product of dimensions; None if several have units."""
    sizes = [len(axis) for axis in axes]
    moving = [place for place, axis in enumerate(axes) if not is_fixed(axis)]
    if len(moving) > 1:
        return None
    if not moving:
        return np.zeros(math.prod(sizes), dtype=np.int64)
    place = moving[0]
    shape = [size if place == index else 1 for index, size in enumerate(sizes)]
    return np.broadcast_to(axes[place].reshape(shape), sizes).reshape(-1)


def _factors(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Return the axes of the factors of a dimension; None if the units depend on several of them."""
    if is_fixed(axis):
        return [np.zeros(size, dtype=np.int64) for size in sizes]
    grid = axis.reshape(list(sizes))
    for place, size in enumerate(sizes):
        line = grid[tuple(slice(None) if index == place else 0 for index in range(len(sizes)))]
        shape = [size if index == place else 1 for index in range(len(sizes))]
        if np.array_equal(np.broadcast_to(line.reshape(shape), grid.shape), grid):
            factors = [np.zeros(length, dtype=np.int64) for length in sizes]
            factors[place] = line
            return factors
    return None
