"""Functions with recorded arguments, and the keys of their rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves

__all__ = ["MODEL", "Call", "RowKey", "RowMode", "TimingMode"]

MODEL = "model"
"""Name of the rows of the whole model."""

TimingMode = Literal["eager", "compiled", "cuda_graph", "bf16", "channels_last"]
"""Execution mode: plain eager, torch.compile, a CUDA graph, bf16 autocast, or the channels_last memory format."""


RowMode = Literal["eager", "compiled", "partly_compiled", "cuda_graph", "bf16", "channels_last", "served"]
"""Mode of a row: an execution mode, that of a model of which parts are compiled, or a program that is served."""


# attribute with the copies for the next run
_READY = "_ready"


class RowKey(NamedTuple):
    """Name and mode of a timed call."""

    module: str
    mode: RowMode = "eager"


@dataclass(frozen=True)
class Call:
    """A function with its recorded arguments; calling the object runs the function once for each of them.

    Attributes:
        function: A module, a function that receives one, or a stage of a head, which needs no arguments.
        arguments: Positional and keyword arguments of each run within a forward pass.
        overwritten: Original values of the tensors that the function modifies in place, by index among the leaves.
    """

    function: Callable[..., object]
    arguments: tuple[tuple[Sequence[Any], Mapping[str, Any]], ...] = (((), {}),)
    overwritten: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Tensor]:
        """The first tensor of each run."""
        return [next(leaf for leaf in leaves_of(run) if isinstance(leaf, Tensor)) for run in self.arguments]

    @property
    def is_stage(self) -> bool:
        """True for a stage of a head, which needs no arguments."""
        return not any(args or kwargs for args, kwargs in self.arguments)

    def __call__(self) -> object:
        """Run the function on copies of the containers, because it may remove entries from them."""
        output = None
        # copied before the run, outside of the time
        ready = vars(self).pop(_READY, None) or self._copied()
        for args, kwargs in ready:
            output = self.function(*args, **kwargs)
        return output

    def _copied(self) -> Any:
        return map_leaves(self.arguments, lambda leaf: leaf) if self._has_containers else self.arguments

    @cached_property
    def _has_containers(self) -> bool:
        entries = [entry for args, kwargs in self.arguments for entry in (*args, *kwargs.values())]
        return not all(isinstance(entry, (Tensor, nn.Module, FunctionType)) for entry in entries)

    def restore_inputs(self) -> None:
        """Restore the tensors that the function modifies to their values before the first run, and copy containers."""
        if self.overwritten:
            leaves = leaves_of(self.arguments)
            for index, original in self.overwritten.items():
                leaves[index].copy_(original)
        vars(self)[_READY] = self._copied()
