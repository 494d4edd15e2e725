"""Group of permutations that leave the function of a network unchanged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

__all__ = ["Group", "Orders", "Tensors", "Usable", "num_moved"]

Tensors = Mapping[str, Tensor]
"""Parameters and buffers by name."""

Orders = tuple[Tensor, ...]
"""Permutation of a group: the old place of each new position, int64, one tensor for each level."""

Usable = Callable[[str], bool]
"""Returns whether a tensor enters a comparison."""


class Group(ABC):
    """A group of permutations.

    Attributes:
        name: Name for the report.
        order: Position in the forward pass.
        names: Names of the tensors that it permutes.
    """

    name: str
    order: int

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the tensors that it permutes."""

    @property
    @abstractmethod
    def identity(self) -> Orders:
        """The permutation that changes nothing."""

    @abstractmethod
    def renamed(self, name: str) -> Self:
        """Return the group with another name."""

    @abstractmethod
    def best(self, first: Tensors, second: Tensors, usable: Usable) -> Orders:
        """Return the permutation of the second tensors with the largest inner product with the first."""

    @abstractmethod
    def apply(self, tensors: Tensors, orders: Orders) -> dict[str, Tensor]:
        """Return those of the tensors that the group permutes, permuted."""

    @abstractmethod
    def compose(self, first: Orders, then: Orders) -> Orders:
        """Return the permutation that equals ``first`` followed by ``then``."""

    @abstractmethod
    def random(self, generator: torch.Generator) -> Orders:
        """Draw a permutation."""

    @abstractmethod
    def moved(self, orders: Orders) -> dict[str, tuple[int, int]]:
        """Return how many positions a permutation moves, and of how many, by kind of position."""


def num_moved(order: Tensor) -> int:
    """Return how many positions a permutation moves."""
    return int((order != torch.arange(order.shape[-1])).sum())
