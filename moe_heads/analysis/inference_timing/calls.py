"""What is timed: the whole model, and modules inside it on the inputs that they had there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn, leaves_of, map_leaves
from moe_heads.routing import Router

__all__ = ["MODEL", "Call", "InTurn", "call_of_model", "in_turn", "named_modules", "row_name", "unseen_modules"]

MODEL = "model"


@dataclass(frozen=True)
class Call:
    """A function with its arguments; calling it runs it once.

    Attributes:
        function: A module, or a function that is given one.
        args: Positional arguments.
        kwargs: Named arguments.
        written: What the tensors that the function writes into held before, by their place among the leaves.
    """

    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def module(self) -> object:
        """The module that it calls, once or several times."""
        return self.function.module if isinstance(self.function, InTurn) else self.function

    @property
    def inputs(self) -> list[Tensor]:
        """The first tensor of each call of the module."""
        calls = self.args if isinstance(self.function, InTurn) else [(self.args, dict(self.kwargs))]
        return [next(leaf for leaf in leaves_of(call) if isinstance(leaf, Tensor)) for call in calls]

    @property
    def is_whole(self) -> bool:
        """Whether it is a module on its inputs, and not a stage: a bare function of what it closes over."""
        return bool(self.args or self.kwargs)

    def __call__(self) -> object:
        """Run it, on containers of its own where they can be changed: a function may take entries out."""
        if all(isinstance(arg, (Tensor, nn.Module)) for arg in (*self.args, *self.kwargs.values())):
            return self.function(*self.args, **self.kwargs)
        args, kwargs = map_leaves((self.args, dict(self.kwargs)), lambda leaf: leaf)
        return self.function(*args, **kwargs)

    def renew(self) -> None:
        """Fill the tensors that the function writes into as they were before its first run."""
        if self.written:
            leaves = leaves_of([self.args, dict(self.kwargs)])
            for index, before in self.written.items():
                leaves[index].copy_(before)


class InTurn(nn.Module):
    """Calls a module once for each of its arguments, pairs of positional and named ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *calls: tuple[Sequence[Any], Mapping[str, Any]]) -> None:
        """Run all of them."""
        for args, kwargs in calls:
            self.module(*args, **kwargs)


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that makes all calls of a module, in order: what a model that calls it more than once spends in it."""
    if len(calls) == 1:
        return calls[0]
    assert isinstance(calls[0].function, nn.Module)
    written: dict[int, Tensor] = {}
    start = 0
    for call in calls:
        written |= {start + index: before for index, before in call.written.items()}
        start += len(leaves_of([call.args, dict(call.kwargs)]))
    return Call(InTurn(calls[0].function), tuple((call.args, dict(call.kwargs)) for call in calls), written=written)


def call_of_model(forward_fn: ForwardFn, model: nn.Module, batch: Batch) -> Call:
    """The forward pass of the whole model."""
    return Call(forward_fn, (model, batch))


def named_modules(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules to time beside the whole, by the name of their rows.

    Args:
        model: The model.
        names: Dotted names; by default "backbone" and "head", all modules that own a router, and these routers, apart
            from what TorchScript has compiled.

    Raises:
        ValueError: If a name is unknown, or TorchScript has compiled the module.
    """
    inside = {name: module for name, module in model.named_modules() if name}
    if names is None:
        names = [name for name in _defaults(inside) if not _is_scripted(inside[name])]
    unknown = [name for name in names if name not in inside]
    if unknown:
        raise ValueError(f"modules: expected names of modules, such as {next(iter(inside), None)!r}, got {unknown}")
    scripted = [name for name in names if _is_scripted(inside[name])]
    if scripted:
        raise ValueError(f"modules: expected modules whose inputs can be seen; {scripted} are compiled by TorchScript")
    return {row_name(name): inside[name] for name in names}


def row_name(name: str) -> str:
    """Name of the rows of a module by its dotted name, which is empty for the whole model.

    A child that is itself called "model" must not take the place of the whole, nor what is in it that of its parts.
    """
    return f"{MODEL}.{name}".removesuffix(".") if name.split(".")[0] in {"", MODEL} else name


def unseen_modules(model: nn.Module) -> list[str]:
    """The modules that would be timed by default but that TorchScript has compiled."""
    inside = {name: module for name, module in model.named_modules() if name}
    return [name for name in _defaults(inside) if _is_scripted(inside[name])]


def _defaults(inside: Mapping[str, nn.Module]) -> list[str]:
    routers = {name for name, module in inside.items() if isinstance(module, Router)}
    owners = {name.rpartition(".")[0] for name in routers}
    return [name for name in inside if name in {"backbone", "head"} | owners | routers]


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)
