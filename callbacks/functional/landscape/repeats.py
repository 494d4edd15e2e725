"""The pass that a loss makes, handed on to the accuracy of the same batch instead of a second one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from moe_heads.callbacks.functional.common.environment import device_of
from moe_heads.callbacks.functional.landscape.calls import (
    Call,
    draws_numbers,
    has_hooks_inside,
    intercepted,
    is_opaque,
)

__all__ = ["Repeats"]


class Repeats:
    """Outermost calls of modules, replayed for equal inputs while nothing has moved.

    Where loss and accuracy call the model, or its parts, on the same inputs, the second pass is saved. Calls that draw
    random numbers are made again, and so are all in a pass with a graph.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if not is_opaque(m) and not has_hooks_inside(m)]
        self._device = device_of(model)
        self._calls: list[tuple[nn.Module, Call]] = []
        self._mode: Literal["off", "record", "replay"] = "off"
        self._depth = 0

    def active(self) -> AbstractContextManager[None]:
        """The block in which passes can be recorded and replayed."""
        return intercepted(self._modules, self._called)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A pass to be remembered."""
        self._calls = []
        with self._in_mode("record"):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A pass at the same place that may reuse the one before; it is forgotten afterwards."""
        try:
            with self._in_mode("replay"):
                yield
        finally:
            self._calls = []

    @contextmanager
    def _in_mode(self, mode: Literal["record", "replay"]) -> Iterator[None]:
        self._mode, self._depth = mode, 0
        try:
            yield
        finally:
            self._mode = "off"

    def _called(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._mode == "off" or self._depth or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._mode == "replay":
            for known, call in self._calls:
                if known is module and call.has_inputs(args, kwargs):
                    return call.output
        drew: list[bool] = []
        self._depth += 1
        try:
            with draws_numbers(self._device, drew):
                output = forward(*args, **kwargs)
        finally:
            self._depth -= 1
        if self._mode == "record" and not drew[0]:
            self._calls.append((module, Call(args, kwargs, output)))
        return output
