"""Remember what plain Python containers and tensors hold, to put it back later into the same objects."""

import random
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["remember", "write_back"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None))


def remember(value: Any, known: Collection[int] = ()) -> Callable[[], Any]:
    """A function that puts back what ``value`` holds now and returns it, the same object as before.

    Lists, deques, dicts, sets, tuples and modules are followed to any depth; tensors, arrays and the states of random
    number generators are copied; of anything else only the reference is kept. A list of a million numbers costs one
    copy, not a million steps.

    Args:
        value: Any object.
        known: Identities (``id``) of objects that are taken care of elsewhere.

    Example:
        >>> from moe_heads.analysis._shared.contents import remember
        >>> seen = [1, {"a": [2]}]
        >>> put_back = remember(seen)
        >>> seen[1]["a"].append(3)
        >>> put_back() is seen, seen
        (True, [1, {'a': [2]}])
    """
    return _Memory(known).of(value)


class _Memory:
    def __init__(self, known: Collection[int]) -> None:
        self._known = set(known)

    def of(self, value: Any) -> Callable[[], Any]:
        if isinstance(value, _ATOMS) or id(value) in self._known:
            return lambda: value
        self._known.add(id(value))  # containers may contain themselves
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, np.ndarray):
            return _array(value)
        if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
            return _generator(value)
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, (list, deque)):
            return self._sequence(value)
        if isinstance(value, set):
            return _set(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        return lambda: value

    def _module(self, value: nn.Module) -> Callable[[], Any]:
        """A module outside the tree of modules: a metric in a plain list, say."""
        attributes = self.of(vars(value))

        def restore() -> Any:
            attributes()
            return value

        return restore

    def _parts(self, values: Collection[Any]) -> Callable[[], list[Any]]:
        held = list(values)
        if all(isinstance(value, _ATOMS) for value in held):
            return lambda: held
        parts = [self.of(value) for value in held]
        return lambda: [part() for part in parts]

    def _dict(self, value: dict[Any, Any]) -> Callable[[], Any]:
        keys, parts = list(value), self._parts(value.values())

        def restore() -> Any:
            held = parts()
            same = len(value) == len(keys) and all(a is b for a, b in zip(value, keys, strict=True))
            if not same or any(value[key] is not part for key, part in zip(keys, held, strict=True)):
                value.clear()
                # as a dict: a Counter would count the pairs
                value.update(dict(zip(keys, held, strict=True)))
            return value

        return restore

    def _sequence(self, value: Any) -> Callable[[], Any]:
        parts = self._parts(value)

        def restore() -> Any:
            held = parts()
            if len(value) != len(held) or any(a is not b for a, b in zip(value, held, strict=True)):
                value.clear()
                value.extend(held)
            return value

        return restore

    def _tuple(self, value: tuple[Any, ...]) -> Callable[[], Any]:
        parts = self._parts(value)

        def restore() -> Any:
            parts()
            return value

        return restore


def _set(value: set[Any]) -> Callable[[], Any]:
    held = set(value)

    def restore() -> Any:
        if value != held:
            value.clear()
            value.update(held)
        return value

    return restore


def _array(value: "np.ndarray[Any, Any]") -> Callable[[], Any]:
    held = value.copy()

    def restore() -> Any:
        if value.flags.writeable:
            value[...] = held
        return value

    return restore


def _generator(value: Any) -> Callable[[], Any]:
    """A generator of random numbers that the module keeps for itself."""
    state: Any
    put_back: Callable[[Any], Any]
    if isinstance(value, torch.Generator):
        state, put_back = value.get_state(), value.set_state
    elif isinstance(value, random.Random):
        state, put_back = value.getstate(), value.setstate
    else:
        state, put_back = value.bit_generator.state, partial(setattr, value.bit_generator, "state")

    def restore() -> Any:
        put_back(state)
        return value

    return restore


def _tensor(value: Tensor) -> Callable[[], Any]:
    if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return lambda: value
    held = value.detach().clone()

    def restore() -> Any:
        write_back(value, held)
        return value

    return restore


@torch.no_grad()
def write_back(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor of any kind, unnoticed by autograd."""
    target = tensor.data
    if target.layout == torch.strided:
        # an expanded tensor shares its memory along some dimensions, and torch refuses to write there
        for dim, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dim] > 1:
                target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    # a tensor that was made in inference mode may be written to in inference mode only
    with torch.inference_mode(tensor.is_inference()):
        target.copy_(values)
