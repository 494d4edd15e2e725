"""Masks of padded tokens for the routers inside a model."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.routed_module import RoutedModule, mask_error
from moe_heads.routing.router import Router
from moe_heads.routing.routing import Routing

__all__ = ["MaskHook", "check_mask", "is_time_first", "mask_of_rows", "mask_of_tokens", "masked_modules"]

# Place of the mask among the positional arguments of a router.
_PLACE_OF_MASK = 2


def check_mask(mask: Any) -> None:
    """Check that a mask of tokens is bool of shape (B, T)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        raise mask_error("(B, T)", mask)


def masked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that take a mask, by name: heads and layers, and routers that are in none."""
    found: dict[str, nn.Module] = {}
    owned: set[nn.Module] = set()
    for name, module in model.named_modules():
        # a head or layer passes the mask on to its router
        if isinstance(module, RoutedModule):
            found[name] = module
            owned.update(child for child in module.modules() if isinstance(child, Router))
        elif isinstance(module, Router) and module not in owned:
            found[name] = module
    return found


def mask_of_rows(mask: Tensor, num_rows: int, name: str) -> Tensor | None:
    """Return the mask of the rows of tokens, (B·T,), or None for one row per sample.

    Raises:
        ValueError: If the number of rows is neither B·T nor B.
    """
    if num_rows == mask.numel():
        return mask.flatten()
    if num_rows == mask.shape[0]:
        return None
    raise _mismatch(mask, f"{num_rows} rows", name)


def is_time_first(mask: Tensor, routing: Routing) -> bool:
    """Return whether the rows of a routing are tokens (T, B) with time first. On (B, T) a sample has T rows."""
    return routing.rows_per_sample == mask.shape[0] > 1 and mask.shape[0] != mask.shape[1]


def mask_of_tokens(mask: Tensor, routing: Routing) -> Tensor | None:
    """Return the mask of the rows of a routing, (B·T,), or None if it has another number of rows."""
    if len(routing.logits) != mask.numel():
        return None
    return (mask.t() if is_time_first(mask, routing) else mask).flatten()


def _mismatch(mask: Tensor, got: str, name: str) -> ValueError:
    return ValueError(
        f"mask: expected a mask of the tokens of {name or 'the model'!r}, which got {got}, but the mask is"
        f" {tuple(mask.shape)}. Pass a mask of the tokens that reach it, with True for tokens that the model adds."
    )


class MaskHook:
    """Forward pre-hook that passes the mask to a head, layer or router, unless its caller does.

    A copy of the module (averaged weights, a saved model) gets a hook without a mask, because the mask is that of the
    original's batch.

    Args:
        name: Name of the module, for messages.
        mask: (B, T), or None for a hook that does nothing.

    Attributes:
        was_called: Whether the module ran.
    """

    def __init__(self, name: str, mask: Tensor | None) -> None:
        self._name, self._mask = name, mask
        self.was_called = False

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskHook, (self._name, None)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with the mask, or None to leave them as they are."""
        self.was_called = True
        x = args[0] if args else kwargs.get("x")
        if isinstance(module, Router) and len(args) > _PLACE_OF_MASK:
            args, kwargs = args[:_PLACE_OF_MASK], {**kwargs, "mask": args[_PLACE_OF_MASK]}
        if self._mask is None or not isinstance(x, Tensor) or x.dim() < 2 or kwargs.get("mask") is not None:
            return None  # the module checks its arguments
        mask: Tensor | None
        if x.shape[:-1] == self._mask.shape:
            mask = self._mask
        elif x.dim() == 2:
            mask = mask_of_rows(self._mask, len(x), self._name)
        else:
            raise _mismatch(self._mask, f"x of shape {tuple(x.shape)}", self._name)
        if mask is None:
            return None
        if isinstance(module, Router):
            module.check_takes_mask()
        return args, {**kwargs, "mask": mask}
