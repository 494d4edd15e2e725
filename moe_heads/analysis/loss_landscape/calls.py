"""What a call of a module took and gave, to be given again where the same would be computed once more."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis._shared.forwards import is_opaque
from moe_heads.analysis._shared.random_states import random_states
from moe_heads.routing import Router

__all__ = ["Call", "draws_numbers", "has_hooks_inside", "largest_below"]

_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Call:
    """One call of a module, with the tensors themselves, in containers of its own: a caller may edit a list it got.

    Args:
        args: What the module took.
        kwargs: The same by name.
        output: What it gave.

    Attributes:
        num_hits: How often the same inputs came again.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._output, self.num_hits = _in_new_containers(output), 0
        self._names, self._inputs = list(kwargs), leaves_of((args, kwargs))
        self._changes_inputs = False
        self._versions = _versions_of(self.tensors)

    @classmethod
    def made(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["Call", Any]:
        """Make a call, and note whether it changes what it takes: the call, and what the module gave."""
        taken = leaves_of((args, kwargs))
        before = _versions_of(taken)
        output = forward(*args, **kwargs)
        call = cls(args, kwargs, output)
        same = len(taken) == len(call._inputs) and all(a is b for a, b in zip(taken, call._inputs, strict=True))
        call._changes_inputs = not same or before != _versions_of(taken)
        return call, output

    @property
    def output(self) -> Any:
        """What it gave: the same tensors in new containers, each time."""
        return _in_new_containers(self._output)

    @property
    def tensors(self) -> list[Tensor]:
        """Inputs and outputs."""
        return [leaf for leaf in (*self._inputs, *leaves_of(self._output)) if isinstance(leaf, Tensor)]

    @property
    def is_replayable(self) -> bool:
        """Whether it holds tensors and plain values alone, none with a graph, none changed in place since."""
        if self._changes_inputs:
            return False
        if not all(isinstance(leaf, (Tensor, *_ATOMS)) for leaf in (*self._inputs, *leaves_of(self._output))):
            return False
        if any(tensor.is_inference() or tensor.requires_grad for tensor in self.tensors):
            return False
        return self._versions == _versions_of(self.tensors)

    def has_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these are the same inputs, bit for bit, and it can be given again."""
        leaves = leaves_of((args, kwargs))
        if list(kwargs) != self._names or len(leaves) != len(self._inputs) or not self.is_replayable:
            return False
        return all(_is_same(given, known) for given, known in zip(leaves, self._inputs, strict=True))

    def has_output(self, output: Any) -> bool:
        """Whether this is the same output, bit for bit."""
        given, known = leaves_of(output), leaves_of(self._output)
        return len(given) == len(known) and all(map(_is_same, given, known))


def _in_new_containers(value: Any) -> Any:
    return map_leaves(value, lambda leaf: leaf)


def _versions_of(leaves: Iterable[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _is_same(given: Any, known: Any) -> bool:
    if given is known:
        return True
    if not isinstance(given, Tensor) or not isinstance(known, Tensor):
        return type(given) is type(known) and isinstance(given, _ATOMS) and bool(given == known)
    alike = (given.shape, given.dtype, given.device) == (known.shape, known.dtype, known.device)
    if not alike or given.requires_grad:
        return False
    # nan is like nan here: the same bits came out
    return torch.equal(given, known) or bool(((given == known) | ((given != given) & (known != known))).all())


def has_hooks_inside(module: nn.Module) -> bool:
    """Whether somebody listens below a module, who would miss a pass that is not made."""
    below: Collection[nn.Module] = [other for other in module.modules() if other is not module]
    return any(other._forward_hooks or other._forward_pre_hooks for other in below)


def largest_below(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The largest modules below one that are wanted, hold a weight, no router, and nobody who listens inside.

    Without a weight inside there is little to save, and an output is memory. A router's choices are collected by hooks.

    Yields:
        Each of them, once for each place where it stands.
    """
    for child in module.children():
        if is_opaque(child):
            continue
        holds_weight = any(True for _ in child.parameters())
        is_quiet = not has_hooks_inside(child) and not any(isinstance(other, Router) for other in child.modules())
        if holds_weight and is_quiet and is_wanted(child):
            yield child
        else:
            yield from largest_below(child, is_wanted)


@contextmanager
def draws_numbers(device: torch.device, found: list[bool]) -> Iterator[None]:
    """Append whether torch drew random numbers while the block ran."""
    before = random_states(device)
    yield
    found.append(any(not torch.equal(one, two) for one, two in zip(before, random_states(device), strict=True)))
