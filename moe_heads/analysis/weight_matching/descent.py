"""Weight matching by coordinate descent over groups of permutations (Ainsworth et al., Git Re-Basin, arXiv 2209.04836).

The distance between two networks is smallest where the inner product of the first with the permuted second is largest.
For one group, with the others held, that is a linear assignment problem.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.weight_matching.group import Group, Orders, Tensors

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
    and ``num_restarts`` more are random permutations. With one group, a single step finds the best permutation. With
    several, the result is a local optimum.

    Args:
        groups: The groups, in the order of the forward pass.
        first: Parameters of the first network.
        second: Parameters of the second network.
        num_restarts: Number of random starts.
        seed: Seed of the random starts.
    """
    tensors = [{name: tensor.detach().double().cpu() for name, tensor in given.items()} for given in (first, second)]
    descents = [_Descent(groups, *tensors) for _ in range(2 + (num_restarts if len(groups) > 1 else 0))]
    descents[0].propagate()
    generator = torch.Generator().manual_seed(seed)
    for descent in descents[2:]:
        descent.scramble(generator)
    found = [descent.run() for descent in descents]
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

    def run(self) -> Matching:
        """Improve group by group until no group improves."""
        improves = True
        while improves:
            improved = [self._improve(group) for group in self._groups]
            improves = any(improved)
        return Matching(self._orders, self._inner_product(set(self._first)))

    def scramble(self, generator: torch.Generator) -> None:
        """Start from random permutations."""
        for group in self._groups:
            self._move(group, group.random(generator))

    def propagate(self) -> None:
        """Match the groups one by one, each by the tensors whose other groups are matched."""
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
