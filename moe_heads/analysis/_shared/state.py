"""Snapshots of a model and of plain Python containers, restored bit for bit into the same objects."""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.generators import generator_states, restore_generators
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.shards import local, reshard

__all__ = ["Original", "preserved", "snapshot", "write_back"]

Original = Callable[[Tensor], Tensor]
"""The values that a parameter or buffer had when the block began."""

# The snapshots of the blocks that enclose this code, by the identity of the tensor.
_enclosing: ContextVar[Mapping[int, "_TensorState"]] = ContextVar("enclosing")

# Integers of the same size, to compare floating-point numbers bit for bit.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ATOMS = (bool, int, float, complex, str, bytes, type(None))


def snapshot(value: Any, known: Collection[int] = ()) -> Callable[[], Any]:
    """Return a function that restores what ``value`` holds now and returns it, the same object as before.

    Lists, deques, dicts, sets, tuples and modules are followed to any depth; tensors, arrays and the states of random
    number generators are copied; of anything else only the reference is kept. A list of a million numbers costs one
    copy, not a million steps.

    Args:
        value: Any object.
        known: Identities (``id``) of objects that are taken care of elsewhere.

    Example:
        >>> from moe_heads.analysis._shared.state import snapshot
        >>> seen = [1, {"a": [2]}]
        >>> restore = snapshot(seen)
        >>> seen[1]["a"].append(3)
        >>> restore() is seen, seen
        (True, [1, {'a': [2]}])
    """
    return _Snapshot(known).of(value)


class _Snapshot:
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
        # an expanded tensor shares its memory along some dimensions, and torch cannot write there
        for dim, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dim] > 1:
                target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    # a tensor that was made in inference mode may be written to in inference mode only
    with torch.inference_mode(tensor.is_inference()):
        target.copy_(values)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Original]:
    """Put back, on leaving the block, whatever the block did to ``model`` and to the random number generators.

    Covers parameters, buffers, ``.grad``, ``requires_grad`` and train / eval flags, all other attributes of the model
    and its submodules (counters, lists, dicts, hidden states, the states of torchmetrics metrics), and the generators
    of Python, NumPy, torch and every CUDA device. Tensors and containers keep their identity, so optimizers and views
    stay attached. Costs one copy of the model's tensors while the block runs. A block inside another one shares the
    copies of all tensors that are still the same, bit for bit. Gradients are set aside as they are, so that ``.grad``
    is None in the block.

    Yields:
        What gives a parameter or buffer as it was when the block began: that copy, not to be written to.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import preserved
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> with preserved(layer):
        ...     _ = layer.weight.data.zero_()
        >>> torch.equal(layer.weight, before)
        True
    """
    reshard(model)
    # a lazy tensor has no values yet, and each analysis raises an error for it
    known = [t for t in dict.fromkeys([*model.parameters(), *model.buffers()]) if not _is_lazy(t)]
    enclosing = _enclosing.get({})
    tensors = [_TensorState(tensor, enclosing.get(id(tensor))) for tensor in known]
    taken_care_of = {id(value) for value in (*known, *model.modules())}
    attributes = [snapshot(vars(module), known=taken_care_of) for module in model.modules()]
    generators = generator_states()
    held = {**enclosing, **{id(state.tensor): state for state in tensors}}
    token = _enclosing.set(held)
    try:
        for tensor in tensors:
            tensor.set_grad_aside()
        yield lambda tensor: held[id(tensor)].values
    finally:
        with HeldInterrupts():
            reshard(model)
            for put_back in attributes:
                put_back()
            for tensor in tensors:
                tensor.restore()
            restore_generators(generators)
            _enclosing.reset(token)


class _TensorState:
    """Values, gradient, ``requires_grad`` flag and attributes of one parameter or buffer."""

    def __init__(self, tensor: Tensor, enclosing: "_TensorState | None" = None) -> None:
        self.tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self.values: Tensor
        if enclosing is not None and enclosing.tensor is tensor and _same_bits(tensor, enclosing.values):
            self.values = enclosing.values
        else:
            self.values = tensor.detach().clone()
        # torch.compile leaves marks on the tensors that it has seen
        self._attributes = dict(vars(tensor))

    def set_grad_aside(self) -> None:
        """Detach the gradient from the tensor. What is not there cannot be overwritten, so it needs no copy."""
        if self._grad is not None:
            self.tensor.grad = None

    def restore(self) -> None:
        write_back(self.tensor, self.values)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
            self.tensor.grad = self._grad
        vars(self.tensor).clear()
        vars(self.tensor).update(self._attributes)


def _same_bits(tensor: Tensor, values: Tensor) -> bool:
    """Return whether two tensors hold the same bits. Zeros of both signs differ."""
    kind = _INTEGERS.get(tensor.dtype.itemsize)
    alike = (tensor.dtype, tensor.device, tensor.shape) == (values.dtype, values.device, values.shape)
    if kind is None or not alike or tensor.layout != torch.strided or values.layout != torch.strided:
        return False
    return torch.equal(local(tensor.detach()).view(kind), local(values).view(kind))


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
