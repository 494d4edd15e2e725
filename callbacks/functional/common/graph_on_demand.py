"""Evaluate losses without the memory of a graph, but for those that take a gradient themselves."""

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["GraphOnDemand"]

T = TypeVar("T")


class GraphOnDemand:
    """Calls functions without recording a graph, until one of them asks for it (a penalty on a gradient, say)."""

    def __init__(self) -> None:
        self._needs_graph = False

    def __call__(self, function: Callable[[], T]) -> T:
        """What ``function()`` returns; it is called again, with a graph, when it fails for want of one."""
        try:
            with torch.set_grad_enabled(self._needs_graph):
                return function()
        except RuntimeError as error:
            if self._needs_graph or "does not require grad" not in str(error):
                raise
        self._needs_graph = True
        return self(function)
