"""Units that several tensors index, and their permutations."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from moe_heads.analysis.weight_matching.group import Group, Orders, Tensors, Usable, num_moved
from moe_heads.analysis.weight_matching.linear_assignment import best_assignment

__all__ = ["Positions", "UnitGroup"]


@dataclass(frozen=True)
class Positions:
    """Positions of the units of a group along one dimension of a tensor.

    Attributes:
        tensor: Name of the tensor.
        dim: The dimension.
        places: Places of each unit, (units, places of a unit), int64.
    """

    tensor: str
    dim: int
    places: Tensor


@dataclass(frozen=True)
class UnitGroup(Group):
    """Units that appear in the same dimensions of the same tensors.

    Attributes:
        name: Name for the report.
        order: Position in the forward pass.
        positions: Where the units appear.
    """

    name: str
    order: int
    positions: tuple[Positions, ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.positions[0].places)

    @property
    @override
    def names(self) -> frozenset[str]:
        return frozenset(position.tensor for position in self.positions)

    @property
    @override
    def identity(self) -> Orders:
        return (torch.arange(self.size),)

    @override
    def renamed(self, name: str) -> Self:
        return replace(self, name=name)

    @override
    def best(self, first: Tensors, second: Tensors, usable: Usable) -> Orders:
        similarity = torch.zeros(self.size, self.size, dtype=torch.float64)
        for position in self.positions:
            if usable(position.tensor):
                rows = [_rows(tensors[position.tensor], position) for tensors in (first, second)]
                similarity += rows[0] @ rows[1].T
        return (best_assignment(similarity)[0],)

    @override
    def apply(self, tensors: Tensors, orders: Orders) -> dict[str, Tensor]:
        found = {name: tensors[name] for name in self.names if name in tensors}
        for position in self.positions:
            if position.tensor not in found:
                continue
            tensor = found[position.tensor]
            index = torch.arange(tensor.shape[position.dim])
            index[position.places.flatten()] = position.places[orders[0]].flatten()
            found[position.tensor] = tensor.index_select(position.dim, index.to(tensor.device))
        return found

    @override
    def compose(self, first: Orders, then: Orders) -> Orders:
        return (first[0][then[0]],)

    @override
    def random(self, generator: torch.Generator) -> Orders:
        return (torch.randperm(self.size, generator=generator),)

    @override
    def moved(self, orders: Orders) -> dict[str, tuple[int, int]]:
        return {"units": (num_moved(orders[0]), self.size)}


def _rows(tensor: Tensor, position: Positions) -> Tensor:
    moved = tensor.movedim(position.dim, 0)
    return moved[position.places].reshape(len(position.places), -1)
