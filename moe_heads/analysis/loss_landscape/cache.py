"""Outputs of modules that are computed once and reused wherever the same inputs occur again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.forwards import intercepted, is_opaque
from moe_heads.analysis._shared.generators import random_states
from moe_heads.analysis._shared.memory import memory_budget
from moe_heads.routing import Router

__all__ = ["OutputCache"]

T = TypeVar("T")

_CPU_MEMORY, _SHARE_OF_GPU = 2**30, 1 / 4

# Points at which reused outputs are also computed: both ends of a line or plane, and the point after them.
_NUM_VALIDATIONS = 3

_DIFFERENT_OUTPUT = "a module returned a different output for the same inputs"

# Values that are compared by ``==`` and cannot change.
_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class OutputCache:
    """Outputs of modules of a model, reused across the points of a landscape and within a point.

    Three kinds of outputs are reused:

    - of the prefix, the modules before the first one with a moved tensor (the backbone below a moved head): recorded at
      the center, reused at all other points;
    - of the loss in the accuracy, if both call the model or its modules with the same inputs;
    - of the loss at free routing in the loss at fixed routing, from modules without a router.

    An output is reused only for inputs that equal the recorded ones bit for bit. Excluded are modules that draw random
    numbers, calls with a graph, calls that change their inputs, and modules with hooks inside.

    A module that changes more than its output, or reads a moved tensor of another module, would make reuse wrong. So
    `validate` compares the first points with plain evaluations, and returns the plain values there. No value that was
    measured before a kind of reuse was disabled depends on it.

    Args:
        model: The model.
        moved: Its tensors that move.
        shares_accuracy: Whether accuracies are measured.
        shares_fixed_routing: Whether the loss at fixed routing is measured.
        memory: Bytes that the prefix may occupy. Defaults to 1 GiB on a CPU and a quarter of the free memory on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        moved: Iterable[Tensor],
        *,
        shares_accuracy: bool = False,
        shares_fixed_routing: bool = False,
        memory: int | None = None,
    ) -> None:
        device = device_of(model)
        moving = {id(tensor) for tensor in moved}

        def moves(tensors: Iterable[Tensor]) -> bool:
            return any(id(tensor) in moving for tensor in tensors)

        owners = [m for m in model.modules() if moves([*m.parameters(False), *m.buffers(False)])]
        fixed = _largest_modules(model, lambda m: not moves([*m.parameters(), *m.buffers()]))
        whole = (m for m in model.modules() if not is_opaque(m) and not _has_hooks_inside(m))
        self._names = {module: name for name, module in model.named_modules()}
        self._prefix = _Reuse(fixed, device, ends=owners, memory=_Memory(device, memory))
        self._accuracy = _Reuse(whole if shares_accuracy else (), device)
        without_router = _largest_modules(model, lambda m: True) if shares_fixed_routing else ()
        self._fixed_routing = _Reuse(without_router, device)
        self._reuses = (self._prefix, self._accuracy, self._fixed_routing)

    @property
    def is_on(self) -> bool:
        """True if any outputs may be reused."""
        return any(reuse.is_on for reuse in self._reuses)

    @property
    def reused(self) -> tuple[str, ...]:
        """Modules of the prefix whose outputs are reused, by their name in the model."""
        kept = {module for _, module in self._prefix.calls} if self._prefix.is_on else set()
        return tuple(name for module, name in self._names.items() if module in kept)

    @property
    def not_reused(self) -> str:
        """Reason why the prefix is no longer reused, or ""."""
        return self._prefix.reason

    @property
    def not_shared(self) -> str:
        """Reasons why accuracy or the loss at fixed routing take separate passes, or ""."""
        named = {"accuracy": self._accuracy.reason, "fixed routing": self._fixed_routing.reason}
        return "; ".join(f"{name}: {reason}" for name, reason in named.items() if reason)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Intercept the calls of modules inside the block."""
        with ExitStack() as stack:
            for reuse in self._reuses:
                stack.enter_context(intercepted(reuse.modules, reuse.called))
            yield

    def record(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Evaluate the center, whose prefix outputs are recorded by `begin`, and return its values.

        The center counts as a validation of the accuracy: its values are those of separate passes.
        """
        self._prefix.clear()
        with self._comparing():
            values = evaluate()
        if self._accuracy.has_difference:
            self._accuracy.disable(_DIFFERENT_OUTPUT)
        return values

    def begin(self, index: int, *, records: bool) -> None:
        """Begin a batch: record its prefix, or reuse what was recorded for the batch of this index."""
        self._prefix.start("record" if records else "reuse", index)

    @contextmanager
    def loss_pass(self) -> Iterator[None]:
        """Record outputs of the loss for `accuracy_pass` and `fixed_routing_pass` of the same batch."""
        with self._accuracy.recording(), self._fixed_routing.recording():
            yield

    def accuracy_pass(self) -> AbstractContextManager[None]:
        """Reuse outputs of the loss in the accuracy, then release them."""
        return self._accuracy.reusing_once()

    def fixed_routing_pass(self) -> AbstractContextManager[None]:
        """Reuse outputs of the loss at free routing in the loss at fixed routing, then release them."""
        return self._fixed_routing.reusing_once()

    def validate(self, values: Tensor, evaluate: Callable[[], Tensor]) -> Tensor:
        """Compare values with those of a plain evaluation, if reused outputs in them need a validation.

        A kind of reuse is disabled if one of its modules returns a different output. If none does and the values still
        differ, every kind that was used is disabled.

        Args:
            values: Values of an evaluation that may have reused outputs.
            evaluate: Repeats this evaluation.

        Returns:
            The plain values where they were evaluated, otherwise ``values``.
        """
        if not any(reuse.needs_validation for reuse in self._reuses):
            return values
        used = [reuse for reuse in self._reuses if reuse.is_on and reuse.was_used]
        # the plain evaluation last: it may leave behind a change that a reused output leaves out
        with self._comparing():
            plain = evaluate()
        # otherwise a batch was halved in between, and all of them are recorded again
        if plain.shape == values.shape:
            self._judge(used, is_same=torch.allclose(values, plain, rtol=0, atol=0, equal_nan=True))
        return plain

    def revalidate(self) -> None:
        """Validate at least one more point, as for another direction."""
        for reuse in self._reuses:
            reuse.num_validations_left = max(reuse.num_validations_left, 1)

    def disable(self, reason: str) -> None:
        """Reuse nothing from here on."""
        for reuse in self._reuses:
            if reuse.is_on:
                reuse.disable(reason)

    def _judge(self, used: Sequence["_Reuse"], *, is_same: bool) -> None:
        is_explained = any(reuse.has_difference for reuse in used)
        for reuse in used:
            if reuse.has_difference:
                reuse.disable(_DIFFERENT_OUTPUT)
            elif is_same:
                reuse.confirm()
            elif not is_explained:
                what = "outputs of the center" if reuse is self._prefix else "outputs of another pass"
                reuse.disable(f"the loss with reused {what} differed from that of a plain evaluation")

    @contextmanager
    def _comparing(self) -> Iterator[None]:
        """Compute every output that would be reused, and compare the two."""
        with ExitStack() as stack:
            for reuse in self._reuses:
                stack.callback(setattr, reuse, "is_comparing", reuse.is_comparing)
                reuse.is_comparing, reuse.has_difference = True, False
            yield


class _Reuse:
    """Recorded calls of some modules, and the state of their validation.

    The outermost call of these modules is recorded or reused. The calls inside it belong to it.

    Args:
        modules: The modules.
        device: Device of the model.
        ends: Modules after whose call nothing is recorded.
        memory: Memory of the recorded tensors. By default it is not limited.

    Attributes:
        modules: Modules whose calls have to be intercepted.
        is_on: Whether outputs are reused.
        reason: Reason why they no longer are, or "".
        calls: Recorded calls by batch and module.
        was_used: Whether an output was reused since the last validation.
        is_comparing: Whether each reused output is also computed and compared.
        has_difference: Whether one of them differed.
        num_validations_left: Points that still have to be compared with a plain evaluation.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device,
        ends: Iterable[nn.Module] = (),
        memory: "_Memory | None" = None,
    ) -> None:
        recorded = list(dict.fromkeys(modules))
        self._device, self._ends, self._memory = device, set(ends), memory
        self.modules = [*recorded, *self._ends] if recorded else []
        self.is_on, self.reason = bool(recorded), ""
        self.calls: dict[tuple[int, nn.Module], list[_Call]] = {}
        self.was_used = self.is_comparing = self.has_difference = False
        self.num_validations_left = _NUM_VALIDATIONS
        self._mode: Literal["off", "record", "reuse"] = "off"
        self._index = self._depth = 0

    @property
    def needs_validation(self) -> bool:
        """True if outputs were reused that still have to be compared with a plain evaluation."""
        return self.is_on and self.was_used and self.num_validations_left > 0

    def start(self, mode: Literal["off", "record", "reuse"], index: int = 0) -> None:
        """Record or reuse calls for a batch."""
        self._mode, self._index, self._depth = mode, index, 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls in the block, in place of earlier ones."""
        self.clear()
        self.start("record")
        try:
            yield
        finally:
            self.start("off")

    @contextmanager
    def reusing_once(self) -> Iterator[None]:
        """Reuse the recorded calls in the block, then release them."""
        self.start("reuse")
        try:
            yield
        finally:
            self.start("off")
            self.clear()

    def clear(self) -> None:
        """Release the recorded calls."""
        self.calls = {}
        if self._memory is not None:
            self._memory.clear()

    def confirm(self) -> None:
        """Count a validation that found no difference, and release the calls whose inputs did not occur again."""
        self.num_validations_left -= 1
        self.was_used = False
        hit = {key: [call for call in calls if call.num_hits] for key, calls in self.calls.items()}
        self.calls = {key: calls for key, calls in hit.items() if calls}

    def disable(self, reason: str) -> None:
        """Reuse nothing from here on."""
        self.is_on, self.reason = False, reason
        self.clear()

    def called(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the output of a call, computed or reused; see `intercepted`."""
        if module in self._ends:
            self._mode = "off" if self._mode == "record" else self._mode
            return forward(*args, **kwargs)
        if self._mode == "off" or not self.is_on or self._depth or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._mode == "record":
            return self._recorded(module, forward, args, kwargs)
        for call in self.calls.get((self._index, module), ()):
            if call.has_inputs(args, kwargs):
                return self._reused(call, lambda: self._inside(lambda: forward(*args, **kwargs)))
        return self._inside(lambda: forward(*args, **kwargs))

    def _recorded(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = random_states(self._device)
        call, output = self._inside(lambda: _Call.made(forward, args, kwargs))
        draws = any(not torch.equal(x, y) for x, y in zip(before, random_states(self._device), strict=True))
        if not draws and call.is_reusable and (self._memory is None or self._memory.takes(call.tensors)):
            self.calls.setdefault((self._index, module), []).append(call)
        return output

    def _reused(self, call: "_Call", compute: Callable[[], Any]) -> Any:
        self.was_used = True
        call.num_hits += 1
        if not self.is_comparing:
            return call.output
        output = compute()
        self.has_difference = self.has_difference or not call.has_output(output)
        return output

    def _inside(self, compute: Callable[[], T]) -> T:
        """Compute an output without recording or reusing the calls inside it."""
        self._depth += 1
        try:
            return compute()
        finally:
            self._depth -= 1


class _Memory:
    """Size of the recorded tensors, counted once for each storage."""

    def __init__(self, device: torch.device, limit: int | None) -> None:
        self._device, self._limit = device, limit
        self._sizes: dict[int, int] = {}

    def clear(self) -> None:
        self._sizes = {}

    def takes(self, tensors: Iterable[Tensor]) -> bool:
        """Count these tensors if they fit, and return whether they do."""
        if self._limit is None:
            self._limit = memory_budget(self._device, on_cpu=_CPU_MEMORY, share_of_gpu=_SHARE_OF_GPU)
        sizes = self._sizes | {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        if sum(sizes.values()) > self._limit:
            return False
        self._sizes = sizes
        return True


class _Call:
    """Inputs and output of one call of a module, in new containers, since a caller may edit a list it received.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: The output.

    Attributes:
        num_hits: Number of later calls with the same inputs.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._output, self.num_hits = _in_new_containers(output), 0
        self._names, self._inputs = list(kwargs), leaves_of((args, kwargs))
        self._changes_inputs = False
        self._versions = _versions_of(self.tensors)

    @classmethod
    def made(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["_Call", Any]:
        """Make a call, note whether it changes its inputs, and return it with the output."""
        inputs = leaves_of((args, kwargs))
        before = _versions_of(inputs)
        output = forward(*args, **kwargs)
        call = cls(args, kwargs, output)
        is_same = len(inputs) == len(call._inputs) and all(a is b for a, b in zip(inputs, call._inputs, strict=True))
        call._changes_inputs = not is_same or before != _versions_of(inputs)
        return call, output

    @property
    def output(self) -> Any:
        """The recorded tensors, in new containers each time."""
        return _in_new_containers(self._output)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of the inputs and of the output."""
        return [leaf for leaf in (*self._inputs, *leaves_of(self._output)) if isinstance(leaf, Tensor)]

    @property
    def is_reusable(self) -> bool:
        """True if it has only tensors and plain values, none with a graph, none changed in place since."""
        if self._changes_inputs:
            return False
        if not all(isinstance(leaf, (Tensor, *_ATOMS)) for leaf in (*self._inputs, *leaves_of(self._output))):
            return False
        if any(tensor.is_inference() or tensor.requires_grad for tensor in self.tensors):
            return False
        return self._versions == _versions_of(self.tensors)

    def has_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if the inputs equal these bit for bit, and the call is reusable."""
        leaves = leaves_of((args, kwargs))
        if list(kwargs) != self._names or len(leaves) != len(self._inputs) or not self.is_reusable:
            return False
        return all(map(_is_same, leaves, self._inputs))

    def has_output(self, output: Any) -> bool:
        """True if the output equals this one bit for bit."""
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
    has_same_form = (given.shape, given.dtype, given.device) == (known.shape, known.dtype, known.device)
    if not has_same_form or given.requires_grad:
        return False
    # nan equals nan here: the bits are the same
    return torch.equal(given, known) or bool(((given == known) | ((given != given) & (known != known))).all())


def _has_hooks_inside(module: nn.Module) -> bool:
    """True if modules inside have hooks, which would miss a call that is not made."""
    inside = (other for other in module.modules() if other is not module)
    return any(other._forward_hooks or other._forward_pre_hooks for other in inside)


def _largest_modules(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Find the largest wanted modules inside a module that have a parameter, no router and no hooks inside.

    Without a parameter there is little to save, and an output takes memory. Choices of a router are collected by hooks.

    Yields:
        Each of them, once for each of its places.
    """
    for child in module.children():
        if is_opaque(child):
            continue
        has_parameter = any(True for _ in child.parameters())
        is_plain = not _has_hooks_inside(child) and not any(isinstance(other, Router) for other in child.modules())
        if has_parameter and is_plain and is_wanted(child):
            yield child
        else:
            yield from _largest_modules(child, is_wanted)
