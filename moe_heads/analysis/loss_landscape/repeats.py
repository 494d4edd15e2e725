"""What one pass over a batch has computed, handed on to the next one at the same place."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.forwards import intercepted, is_opaque
from moe_heads.analysis.loss_landscape.calls import (
    Call,
    draws_numbers,
    has_hooks_inside,
    largest_below,
)
from moe_heads.analysis.loss_landscape.saving import Saving

__all__ = ["Repeats"]

T = TypeVar("T")


class Repeats(Saving):
    """Outermost calls of some modules, replayed for equal inputs while nothing has moved.

    Calls that draw random numbers are made again, and so are all in a pass with a graph.

    Args:
        model: The model.
        modules: Those of its modules whose calls are remembered.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        super().__init__(is_on=bool(self._modules))
        self._device = device_of(model)
        self._calls: list[tuple[nn.Module, Call]] = []
        self._mode: Literal["off", "record", "replay"] = "off"
        self._depth = 0

    def active(self) -> AbstractContextManager[None]:
        """The block in which passes can be recorded and replayed."""
        return intercepted(self._modules, self._called)

    @classmethod
    def of_all(cls, model: nn.Module) -> "Repeats":
        """Whatever loss and accuracy both call: the model, or its parts, as they have it."""
        return cls(model, (m for m in model.modules() if not is_opaque(m) and not has_hooks_inside(m)))

    @classmethod
    def without_routers(cls, model: nn.Module) -> "Repeats":
        """What gives the same whether the routing is held or free: modules without a router inside."""
        return cls(model, largest_below(model, lambda module: True))

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
        if self._mode == "off" or not self.is_on or self._depth or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._mode == "replay":
            for known, call in self._calls:
                if known is module and call.has_inputs(args, kwargs):
                    return self.replay(call, lambda: self._inside(lambda: forward(*args, **kwargs)))
        drew: list[bool] = []
        with draws_numbers(self._device, drew):
            call, output = self._inside(lambda: Call.made(forward, args, kwargs))
        if self._mode == "record" and not drew[0]:
            self._calls.append((module, call))
        return output

    def _inside(self, make: Callable[[], T]) -> T:
        """Made without a look at the calls inside of it."""
        self._depth += 1
        try:
            return make()
        finally:
            self._depth -= 1
