"""Evaluation of a loss in float64 for a model of any data type."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from moe_heads.analysis._shared.batches import Batch, LossFn, map_leaves
from moe_heads.analysis._shared.copies import own_copy

__all__ = ["DoubleLoss"]

T = TypeVar("T")

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class DoubleLoss:
    """Loss of a model with parameters and floating-point buffers copied to float64.

    Tensors that the model or the loss creates are float64 too, also where the code requests float32. The model itself
    does not change.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        params: The parameters to differentiate by, by name.

    Attributes:
        params: Their copies, float64, in the same order.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: Mapping[str, Tensor]) -> None:
        self._evaluation, self._loss_fn = _Evaluation(model), loss_fn
        places = _places(model)
        wide = {id(tensor): _widened(tensor.detach()) for tensor in places.values()}
        self.params = {name: wide[id(tensor)].requires_grad_() for name, tensor in params.items()}
        self._values = {f"model.{place}": wide[id(tensor)] for place, tensor in places.items()}
        names = {id(tensor): name for name, tensor in params.items()}
        self._moved = {f"model.{place}": names[id(t)] for place, t in places.items() if id(t) in names}

    def __call__(self, batch: Batch, params: Sequence[Tensor] | None = None) -> Tensor:
        """Return the loss of a batch at ``params``, by default at the model's own parameters.

        Raises:
            ValueError: If the loss uses parameters other than through the modules of the model.
        """
        loss = self.evaluate(self._loss_fn, batch, params)
        if params is not None and loss.requires_grad and not any(p.requires_grad for p in params):
            # A loss may hold the parameters itself, for example for a penalty. Here they would be constants.
            raise ValueError("the loss uses parameters other than through the modules of the model")
        return loss.reshape(())

    def evaluate(
        self, function: Callable[[nn.Module, Batch], T], batch: Batch, params: Sequence[Tensor] | None = None
    ) -> T:
        """Return ``function(model, batch)`` at ``params``, by default at the model's own parameters."""
        own = self.params.values() if params is None else params
        given = dict(zip(self.params, own, strict=True))
        moved = {place: given[name] for place, name in self._moved.items()}
        copied = map_leaves(own_copy(batch), lambda leaf: _widened(leaf) if isinstance(leaf, Tensor) else leaf)
        with _doubles():
            values = {**self._values, **moved}
            found = torch.func.functional_call(self._evaluation, values, (function, copied), tie_weights=False)
        return cast(T, found)


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name under which a module holds them, each module once.

    ``functional_call`` itself ties weights by all their names, and does not restore the values of a module that has two
    names (torch 2.15).
    """
    places: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places[f"{path}.{name}" if path else name] = tensor
    return places


class _Evaluation(nn.Module):
    """A function of the model as a module, so that ``functional_call`` can replace the parameters of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Batch], T], batch: Batch) -> T:
        return function(self.model, batch)


class _Doubles(TorchFunctionMode):
    """A mode that replaces float32 by float64 in every call, and saves what the call saves for its derivative.

    A checkpoint would compute its part again in the backward pass, after the model has its own parameters back. Its
    hooks on saved tensors do not apply inside of these.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        named = {key: _wider(value) for key, value in (kwargs or {}).items()}
        with saved_tensors_hooks(_itself, _itself):
            return func(*map(_wider, args), **named)


@contextmanager
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widened(tensor: Tensor) -> Tensor:
    """Return a copy, in float64 if it is float32."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype), copy=True)
