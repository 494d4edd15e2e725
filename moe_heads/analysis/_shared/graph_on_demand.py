"""Evaluation of losses without an autograd graph, except for losses that need one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moe_heads.analysis._shared.generators import generators_kept
from moe_heads.analysis._shared.microbatches import unless_out_of_memory

__all__ = ["GraphOnDemand"]

T = TypeVar("T")

# Relative difference of two losses that the order of a sum explains in single precision.
_ROUNDING = 1e-5


class GraphOnDemand:
    """A caller of functions that records an autograd graph only if the loss depends on it.

    At the center of an analysis, each batch is evaluated with and without a graph from the same random numbers. A
    module that takes a different path without gradients returns a different loss from the one that the Hessian
    differentiates. Then every later call records a graph. The same holds after the first call that fails without a
    graph, for example because of a gradient penalty. Batches that do not fit into memory with a graph are not compared.

    Args:
        loss_of: Extracts the loss from the return value of a function.

    Attributes:
        needs_graph: Whether every call records a graph.
    """

    def __init__(self, loss_of: Callable[[Any], float] = float) -> None:
        self._loss_of = loss_of
        self.needs_graph = False

    def __call__(self, function: Callable[[], T], *, compares: bool = False) -> T:
        """Return ``function()``; with ``compares``, also compare its loss with that of a call that records a graph."""
        if not compares or self.needs_graph:
            return self._evaluated(function)
        # the call without a graph comes last: the function may store its results, which must not hold graphs
        with_graph = self._loss_with_graph(function)
        value = self._evaluated(function)
        if self.needs_graph or with_graph is None or not _differ(self._loss_of(value), with_graph):
            return value
        self.needs_graph = True
        return self._evaluated(function)

    def _loss_with_graph(self, function: Callable[[], T]) -> float | None:
        def evaluated() -> float:
            # generators_kept: a loss that draws random numbers has to draw the same ones again
            with torch.enable_grad(), generators_kept():
                return float(self._loss_of(function()))

        return unless_out_of_memory(evaluated)

    def _evaluated(self, function: Callable[[], T]) -> T:
        try:
            with torch.set_grad_enabled(self.needs_graph):
                return function()
        except RuntimeError as error:
            if self.needs_graph or "does not require grad" not in str(error):
                raise
        self.needs_graph = True
        return self._evaluated(function)


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > _ROUNDING * max(abs(one), abs(other))
