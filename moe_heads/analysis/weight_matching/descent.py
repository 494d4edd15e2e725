"""Weight matching by coordinate descent over groups of permutations (Ainsworth et al., Git Re-Basin, arXiv 2209.04836).

The distance between two networks is smallest where the inner product of the first with the permuted second is largest.
For one group, with the others held, that is a linear assignment problem.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.weight_matching.groups import Group, Orders, Tensors

__all__ = ["Matching", "match"]

# A step that raises the inner product by less than this part of it counts as rounding.
_LEAST_GAIN = 1e-12


@dataclass(frozen=True)
class Matching:
    """Permutation of one network that brings it close to another.

    Attributes:
        orders: Permutation of each group, by its name.
        inner_product: Inner product of the parameters of the first network and of the permuted second.
    """

    orders: Mapping[str, Orders]
    inner_product: float


def match(
    groups: Sequence[Group], first: Mapping[str, Tensor], second: Mapping[str, Tensor], num_restarts: int, seed: int
) -> Matching:
    """Return the best matching of several starts.

    The first start matches the groups one by one in the order of the forward pass, each only by the tensors whose other
    groups are matched. It finds a permuted copy if the units differ in their inputs. The second start is the identity,
    and ``num_restarts`` more visit the groups in random order.

    Args:
        groups: The groups, in the order of the forward pass.
        first: Parameters of the first network.
        second: Parameters of the second network.
        num_restarts: Number of starts with a random order.
        seed: Seed of the random orders.
    """
    tensors = [{name: tensor.detach().double().cpu() for name, tensor in given.items()} for given in (first, second)]
    forward = list(range(len(groups)))
    found = [_Descent(groups, *tensors).run(forward, propagates=True), _Descent(groups, *tensors).run(forward)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_restarts if len(groups) > 1 else 0):
        order = torch.randperm(len(groups), generator=generator).tolist()
        found.append(_Descent(groups, *tensors).run(order))
    return max(found, key=lambda matching: matching.inner_product)


class _Descent:
    """One descent, from the identity."""

    def __init__(self, groups: Sequence[Group], first: Tensors, second: Tensors) -> None:
        self._groups, self._first, self._second = groups, first, dict(second)
        self._orders = {group.name: group.identity for group in groups}
        self._owners: dict[str, set[str]] = defaultdict(set)
        for group in groups:
            for name in group.names:
                self._owners[name].add(group.name)

    def run(self, order: Sequence[int], *, propagates: bool = False) -> Matching:
        if propagates:
            self._propagate()
        improves = True
        while improves:
            improved = [self._improve(self._groups[place]) for place in order]
            improves = any(improved)
        names = set(self._first)
        return Matching(self._orders, self._inner_product(names))

    def _propagate(self) -> None:
        waiting = list(self._groups)
        done: set[str] = set()
        while waiting:
            group = next((group for group in waiting if self._has_inputs(group, done)), waiting[0])
            waiting.remove(group)
            known = done | {group.name}
            orders = group.best(
                self._first,
                self._second,
                lambda name, known=known: name in self._first and self._owners[name] <= known,  # type: ignore[misc]
            )
            self._move(group, orders)
            done = known

    def _has_inputs(self, group: Group, done: set[str]) -> bool:
        """Return whether a weight of a group has no other group that still waits."""
        return any(
            name in self._first and self._first[name].dim() > 1 and self._owners[name] <= {*done, group.name}
            for name in group.names
        )

    def _improve(self, group: Group) -> bool:
        names = {name for name in group.names if name in self._first}
        before, held = self._inner_product(names), {name: self._second[name] for name in names}
        orders = group.best(self._first, self._second, names.__contains__)
        scale = sum(float(self._first[name].norm() * held[name].norm()) for name in names)
        self._second.update(group.apply(self._second, orders))
        # where a tensor has the group in two of its dimensions, the assignment is only a proposal
        if self._inner_product(names) <= before + _LEAST_GAIN * scale:
            self._second.update(held)
            return False
        self._orders[group.name] = group.compose(self._orders[group.name], orders)
        return True

    def _move(self, group: Group, orders: Orders) -> None:
        self._second.update(group.apply(self._second, orders))
        self._orders[group.name] = group.compose(self._orders[group.name], orders)

    def _inner_product(self, names: set[str]) -> float:
        return sum(float((self._first[name] * self._second[name]).sum()) for name in names)
