"""Result of a weight matching."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moe_heads.analysis.weight_matching.group import Orders

__all__ = ["MatchedGroup", "WeightMatch"]


@dataclass(frozen=True)
class MatchedGroup:
    """A group of permuted positions.

    Attributes:
        name: Name of the group.
        moved: Number of moved positions and of all, by kind of position.
    """

    name: str
    moved: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class WeightMatch:
    """Permutation of a network that brings it close to another one without a change of its function.

    Attributes:
        tensors: Parameters and buffers of the second network after the permutation, tied ones under each
            of their names.
        groups: What was permuted.
        orders: The permutation of each group by its name: the old place of each new position.
        failed: Why a derived group was not used, by its name.
        unmatched: Weights in which nothing may be permuted, such as attention, or that the loss does not use.
        distance_before: Distance of the parameters before the permutation.
        distance_after: Distance afterwards.
        loss_changed_by: Largest relative change of the loss by a checked permutation.
    """

    tensors: Mapping[str, Tensor]
    groups: tuple[MatchedGroup, ...]
    orders: Mapping[str, Orders]
    failed: Mapping[str, str]
    unmatched: tuple[str, ...]
    distance_before: float
    distance_after: float
    loss_changed_by: float

    @property
    def moved(self) -> dict[str, tuple[int, int]]:
        """Number of moved positions and of all, by kind of position."""
        totals: dict[str, tuple[int, int]] = {}
        for group in self.groups:
            for kind, (moved, size) in group.moved.items():
                before = totals.get(kind, (0, 0))
                totals[kind] = before[0] + moved, before[1] + size
        return totals
