"""Memory budget for the graphs that are kept between products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch, leaves_of, map_leaves
from moe_heads.analysis._shared.memory import memory_budget

__all__ = ["CPU_GRAPH_MEMORY", "GraphMemory"]

CPU_GRAPH_MEMORY = 4 * 2**30
"""Default number of bytes to keep between products on a CPU, unless half of the free memory is less."""


class GraphMemory:
    """Memory budget for graphs, spent batch by batch.

    Args:
        budget: Bytes; None for the default.
        device: Device of the graphs.

    Attributes:
        left: Remaining bytes.
    """

    def __init__(self, budget: int | None, device: torch.device) -> None:
        if budget is None:
            budget = memory_budget(device, on_cpu=CPU_GRAPH_MEMORY, share_of_gpu=1 / 2)
        self.left = budget
        self._known: list[tuple[Any, int]] = []

    def take(self, batch: Batch, least: int, measure: Callable[[], int]) -> bool:
        """Return whether the graph of a batch fits into the remaining memory, and reserve it if so.

        Args:
            batch: The batch.
            least: Lower bound of the bytes of its graph.
            measure: Returns the bytes; called once for all batches of one form.
        """
        if least > self.left:
            return False
        form = _form_of(batch)
        size = next((size for other, size in self._known if form is not None and other == form), None)
        if size is None:
            size = measure()
            self._known.append((form, size))
        if size > self.left:
            return False
        self.left -= size
        return True


def _form_of(batch: Batch) -> Any | None:
    """Return containers, keys, and shapes of tensors; None for a batch that holds other objects."""
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves_of(batch)):
        return None
    return map_leaves(batch, lambda leaf: None if leaf is None else (tuple(leaf.shape), leaf.dtype))
