"""Experts of a mixture, and their permutations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from moe_heads.analysis.weight_matching.group import Group, Orders, Tensors, Usable, num_moved
from moe_heads.analysis.weight_matching.linear_assignment import best_assignment

__all__ = ["ExpertGroup", "PerExpert"]


@dataclass(frozen=True)
class PerExpert:
    """Positions inside each expert, such as its hidden units, that can be permuted for each expert separately.

    Attributes:
        kind: Kind of position, for the report.
        size: Number of positions in an expert, n.
        views: Shape (E, ...) of each tensor with these positions, and the dimension of length n, by name.
    """

    kind: str
    size: int
    views: Mapping[str, tuple[tuple[int, ...], int]]

    def slices(self, tensors: Tensors, usable: Usable) -> Tensor:
        """Return everything that belongs to a position, (E, n, numbers of a position)."""
        parts = [
            tensors[name].reshape(*shape, 1).movedim(dim, 1).flatten(2)
            for name, (shape, dim) in self.views.items()
            if usable(name)
        ]
        if not parts:
            any_shape = next(iter(self.views.values()))[0]
            return torch.zeros(any_shape[0], self.size, 0, dtype=torch.float64)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class ExpertGroup(Group):
    """Experts of a mixture with stacked parameters, with everything that is indexed by expert.

    The best permutation is exact: for each pair of experts, the best permutation of the positions inside them is found
    first, and its value enters the assignment of the experts.

    Attributes:
        name: Name for the report.
        order: Position in the forward pass.
        num_experts: E.
        whole: Names of tensors with one block for each expert along the first dimension, and no positions inside.
        inside: Positions inside the experts.
        moves_experts: Whether the experts themselves may be permuted.
    """

    name: str
    order: int
    num_experts: int
    whole: tuple[str, ...]
    inside: tuple[PerExpert, ...]
    moves_experts: bool

    @property
    @override
    def names(self) -> frozenset[str]:
        return frozenset([*self.whole, *(name for inner in self.inside for name in inner.views)])

    @property
    @override
    def identity(self) -> Orders:
        insides = [torch.arange(inner.size).expand(self.num_experts, -1) for inner in self.inside]
        return (torch.arange(self.num_experts), *insides)

    @override
    def renamed(self, name: str) -> Self:
        return replace(self, name=name)

    @override
    def best(self, first: Tensors, second: Tensors, usable: Usable) -> Orders:
        number = self.num_experts
        values = torch.zeros(number, number, dtype=torch.float64)
        for name in self.whole:
            if usable(name):
                rows = [tensors[name].reshape(number, -1) for tensors in (first, second)]
                values += rows[0] @ rows[1].T
        found: dict[tuple[int, int], list[Tensor]] = {}
        slices = [[inner.slices(tensors, usable) for tensors in (first, second)] for inner in self.inside]
        for one in range(number):
            for other in range(number) if self.moves_experts else (one,):
                found[one, other] = []
                for left, right in slices:
                    order, value = best_assignment(left[one] @ right[other].T)
                    found[one, other].append(order)
                    values[one, other] += value
        experts = best_assignment(values)[0] if self.moves_experts else torch.arange(number)
        chosen = [found[one, int(other)] for one, other in enumerate(experts)]
        return (experts, *(torch.stack(orders) for orders in zip(*chosen, strict=True)))

    @override
    def apply(self, tensors: Tensors, orders: Orders) -> dict[str, Tensor]:
        experts, *insides = orders
        found = {}
        for name in self.names & tensors.keys():
            tensor = tensors[name]
            blocks = tensor.reshape(self.num_experts, -1)
            found[name] = blocks[experts.to(tensor.device)].reshape(tensor.shape)
        for inner, order in zip(self.inside, insides, strict=True):
            for name, (shape, dim) in inner.views.items():
                if name not in found:
                    continue
                tensor = found[name]
                view = tensor.reshape(shape)
                index = order.to(tensor.device)
                index = index.reshape([size if place in {0, dim} else 1 for place, size in enumerate(shape)])
                found[name] = view.gather(dim, index.expand(shape)).reshape(tensor.shape)
        return found

    @override
    def compose(self, first: Orders, then: Orders) -> Orders:
        experts, *insides = then
        return (first[0][experts], *(a[experts].gather(1, b) for a, b in zip(first[1:], insides, strict=True)))

    @override
    def random(self, generator: torch.Generator) -> Orders:
        def draw(size: int) -> Tensor:
            return torch.randperm(size, generator=generator)

        experts = draw(self.num_experts) if self.moves_experts else torch.arange(self.num_experts)
        insides = [torch.stack([draw(inner.size) for _ in range(self.num_experts)]) for inner in self.inside]
        return (experts, *insides)

    @override
    def moved(self, orders: Orders) -> dict[str, tuple[int, int]]:
        counts = {"experts": (num_moved(orders[0]), self.num_experts)} if self.moves_experts else {}
        for inner, order in zip(self.inside, orders[1:], strict=True):
            counts[inner.kind] = (num_moved(order), order.numel())
        return counts
