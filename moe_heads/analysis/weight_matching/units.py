"""Units of a network: equivalence classes of the positions along the dimensions of its tensors.

A unit is a channel, feature or hidden unit that several tensors index: the row of one weight, the entry of a batch
norm, the column of the next weight. All of these positions have to be permuted together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["FIXED", "Axes", "Axis", "TracedTensors", "UnitTable", "is_fixed"]

Axis = npt.NDArray[np.int64]
"""Units of the positions along one dimension."""

Axes = tuple[Axis, ...]
"""One axis for each dimension of a tensor."""

FIXED = 0
"""The unit of all positions that may not move: inputs, classes, samples, pixels."""


class UnitTable:
    """Union-find over units. The class of `FIXED` absorbs every unit that is merged with it."""

    def __init__(self) -> None:
        self._parents = np.zeros(1, dtype=np.int64)

    def fresh(self, number: int) -> Axis:
        """Return an axis of new units."""
        start = len(self._parents)
        units = np.arange(start, start + number, dtype=np.int64)
        self._parents = np.concatenate([self._parents, units])
        return units

    def find(self, axis: Axis) -> Axis:
        """Return the representative of each unit, the smallest of its class."""
        found = axis
        while True:
            above = self._parents[found]
            if np.array_equal(above, found):
                return found
            found = above

    def merge(self, first: Axis, second: Axis) -> None:
        """Merge the units of two axes of equal length, position by position."""
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._root(one), self._root(other)))
            self._parents[high] = low

    def fix(self, axis: Axis) -> None:
        """Merge the units of an axis with `FIXED`."""
        for unit in np.unique(self.find(axis)).tolist():
            self._parents[self._root(unit)] = FIXED

    def _root(self, unit: int) -> int:
        while (above := int(self._parents[unit])) != unit:
            unit = above
        return unit


def is_fixed(axis: Axis) -> bool:
    """Return whether no position of an axis was given a unit of its own."""
    return not axis.any()


class TracedTensors:
    """Axes of the tensors of a forward pass.

    A tensor without axes is data: all of its positions are fixed. Traced tensors are kept, so that identities stay
    unique.

    Args:
        table: The units.
    """

    def __init__(self, table: UnitTable) -> None:
        self.table = table
        self._axes: dict[int, tuple[Tensor, Axes]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._axes

    def of(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor."""
        known = self._axes.get(id(tensor))
        if known is not None and all(len(axis) == size for axis, size in zip(known[1], tensor.shape, strict=False)):
            return known[1]
        return tuple(np.zeros(size, dtype=np.int64) for size in tensor.shape)

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Record the axes of a tensor."""
        self._axes[id(tensor)] = tensor, tuple(axes)

    def fix(self, tensor: Tensor) -> None:
        """Fix all positions of a tensor."""
        if tensor in self:
            for axis in self.of(tensor):
                self.table.fix(axis)
