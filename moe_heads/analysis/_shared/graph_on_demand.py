"""Evaluate losses without the memory of a graph, but for those that need one."""

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
    """Calls functions without recording a graph, unless the loss is another one without it.

    At the center of an analysis each batch is evaluated both with and without a graph, from the same random numbers. A
    module that takes another path where no gradient is recorded gives another loss there than the one that the Hessian
    differentiates, and from then on every call records a graph. So does every call from the first one that fails
    without a graph: a penalty on a gradient, say. What does not fit into memory with a graph is not compared.

    Args:
        loss_of: Returns the loss from what a function returns.

    Attributes:
        needs_graph: Whether every call records a graph.
    """

    def __init__(self, loss_of: Callable[[Any], float] = float) -> None:
        self._loss_of = loss_of
        self.needs_graph = False

    def __call__(self, function: Callable[[], T], *, compares: bool = False) -> T:
        """Return ``function()``; with ``compares`` its loss is compared with that of a call that records a graph."""
        if not compares or self.needs_graph:
            return self._evaluated(function)
        # the plain call last: the function may keep what it computes, which has to be free of graphs
        with_graph = self._loss_with_graph(function)
        value = self._evaluated(function)
        if self.needs_graph or with_graph is None or not _differ(self._loss_of(value), with_graph):
            return value
        self.needs_graph = True
        return self._evaluated(function)

    def _loss_with_graph(self, function: Callable[[], T]) -> float | None:
        def evaluated() -> float:
            # generators_kept: a loss that draws random numbers draws the same ones again
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
