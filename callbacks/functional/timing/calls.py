"""What is timed: the whole model, and modules inside it on the inputs that they had there."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, ForwardFn, batch_size, leaves_of, map_leaves
from moe_heads.routing import Router

__all__ = ["MODEL", "Call", "Captured", "call_of_model", "capture", "named_modules", "resized"]

MODEL = "model"


@dataclass(frozen=True)
class Call:
    """A function with its arguments; calling it runs it once.

    Attributes:
        function: A module, or a function that is given one.
        args: Positional arguments.
        kwargs: Named arguments.
    """

    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it is a module on its inputs, and not a stage: a bare function of what it closes over."""
        return bool(self.args or self.kwargs)

    def __call__(self) -> object:
        """Run it."""
        return self.function(*self.args, **self.kwargs)


def call_of_model(forward_fn: ForwardFn, model: nn.Module, batch: Batch) -> Call:
    """The forward pass of the whole model."""
    return Call(forward_fn, (model, batch))


def named_modules(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules to time beside the whole, by the name of their rows.

    Args:
        model: The model.
        names: Dotted names; by default "backbone" and "head", all modules that own a router, and these routers.

    Raises:
        ValueError: If a name is unknown.
    """
    inside = {name: module for name, module in model.named_modules() if name}
    if names is None:
        routers = {name for name, module in inside.items() if isinstance(module, Router)}
        owners = {name.rpartition(".")[0] for name in routers}
        names = [name for name in inside if name in {"backbone", "head"} | owners | routers]
    unknown = [name for name in names if name not in inside]
    if unknown:
        raise ValueError(f"modules: expected names of modules, such as {next(iter(inside), None)!r}; got {unknown}")
    # a child that is itself called "model" must not take the place of the whole
    return {f"{MODEL}.{name}" if name == MODEL else name: inside[name] for name in names}


def resized(batch: Batch, size: int) -> Batch:
    """The batch with its samples repeated or cut to ``size``; tensors that do not count the samples stay."""
    given = batch_size(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != given:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % given]

    return map_leaves(batch, resize)


@dataclass
class Captured:
    """What one forward pass showed.

    Attributes:
        calls: A call of each module on the inputs of its first call.
        num_bytes: Most bytes that one module read and wrote: what a pass needs at once, about.
    """

    calls: dict[str, Call]
    num_bytes: int


def capture(forward: Call, model: nn.Module, named: Mapping[str, nn.Module]) -> Captured:
    """Run the forward pass once and keep the inputs of the modules."""
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    most = 0

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a copy: a later layer may work in place
        inputs.setdefault(name, map_leaves((args, kwargs), lambda x: x.clone() if isinstance(x, Tensor) else x))

    def measure(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal most
        tensors = [leaf for leaf in leaves_of([args, output]) if isinstance(leaf, Tensor)]
        most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    with ExitStack() as stack:
        for name, module in named.items():
            handle = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            stack.callback(handle.remove)
        for module in model.modules():
            stack.callback(module.register_forward_hook(measure).remove)
        # a model that is compiled would be so anew for the hooks, and once more without them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        forward()
    calls = {name: Call(named[name], *inputs[name]) for name in named if name in inputs}
    return Captured(calls, most)
