"""What is timed: the whole model, and modules inside it on the inputs that they had there."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
        written: What the tensors that the function writes into held before, by their place among the leaves.
    """

    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[int, Tensor] = field(default_factory=dict)

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
    """A copy with its samples repeated or cut to ``size``; tensors that do not count the samples stay as they are."""
    given = batch_size(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != given:
            return leaf.clone()  # the model may write into it
        return leaf[torch.arange(size, device=leaf.device) % given]

    return map_leaves(batch, resize)


@dataclass
class Captured:
    """What one forward pass showed.

    Attributes:
        forward: The forward pass, which knows now what it writes into.
        calls: A call of each module on the inputs of its first call.
        num_bytes: Most bytes that one module read and wrote: what a pass needs at once, about.
    """

    forward: Call
    calls: dict[str, Call]
    num_bytes: int


def capture(forward: Call, model: nn.Module, named: Mapping[str, nn.Module]) -> Captured:
    """Run the forward pass once and keep the inputs of the modules."""
    inputs: dict[str, Call] = {}
    running: dict[str, int] = Counter()
    written: dict[str, dict[int, Tensor]] = {}
    most = 0

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running[name] += 1
        # a copy: a later layer may work in place
        if name not in inputs:
            inputs[name] = Call(named[name], *map_leaves((args, kwargs), _cloned))

    def compare(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if running[name] == 1 and name not in written:
            written[name] = _changes(inputs[name], args, kwargs)

    def measure(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal most
        tensors = [leaf for leaf in leaves_of([args, output]) if isinstance(leaf, Tensor)]
        most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    before = replace(forward, args=map_leaves(forward.args, _cloned))
    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_pre_hook(partial(record, name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(compare, name), with_kwargs=True).remove)
        for module in model.modules():
            stack.callback(module.register_forward_hook(measure).remove)
        # a model that is compiled would be so anew for the hooks, and once more without them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        forward()
    calls = {name: replace(inputs[name], written=written.get(name, {})) for name in named if name in inputs}
    forward = replace(forward, written=_changes(before, forward.args, forward.kwargs))
    forward.renew()
    return Captured(forward, calls, most)


def _cloned(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _changes(before: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """What the tensors held that a run has changed, by their place among the leaves of the arguments."""
    pairs = zip(leaves_of([before.args, dict(before.kwargs)]), leaves_of([args, dict(kwargs)]), strict=False)
    return {
        index: kept.clone()
        for index, (kept, now) in enumerate(pairs)
        if isinstance(kept, Tensor) and isinstance(now, Tensor) and not _is_same(kept, now)
    }


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, a nan being as good as another."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
