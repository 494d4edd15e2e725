"""Models that are partly in half precision: a frozen bfloat16 backbone below a float32 head, a LoRA base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import leaves_of, map_leaves
from moe_heads.callbacks.functional.common.forwards import intercepted, is_opaque
from moe_heads.callbacks.functional.common.promotion import HALF, PromotedPrecision

__all__ = ["computes_in_half", "half_modules_in_autocast"]

# Parts of the messages with which torch refuses tensors of different data types.
_OTHER_DTYPE = ("dtype", "scalar type", "data type", "expected scalar")

_REMEDY = (
    "A part of the model is in half precision. Inside an analysis autocast covers the modules whose parameters are all"
    " in half precision, and float32 the rest. Convert the tensors where the two meet, or analyze a copy in float32:"
    " callback.analyse(copy.deepcopy(model).float(), ...)."
)


def computes_in_half(model: nn.Module) -> torch.dtype | None:
    """Return the half-precision data type that a part of the model computes in; None for a model without one.

    The loss of such a model is known to the rounding of that type: about 3 digits for float16, 2 for bfloat16.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.common.half_precision import computes_in_half
        >>> computes_in_half(torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 1)))
        torch.bfloat16
    """
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    return next((dtype for dtype in HALF if dtype in found), None)


@contextmanager
def half_modules_in_autocast(model: nn.Module) -> Iterator[None]:
    """Evaluate the half-precision parts of a model in autocast while the block runs, and the rest in full precision.

    A module whose parameters are all of one half-precision type runs under autocast of that type, as it did in training
    with ``precision="bf16-mixed"``; what it returns is converted to the type of the other parameters. Elsewhere, where
    half meets full precision, full precision is computed in (`PromotedPrecision`): a LoRA layer of one's own, or a
    weight that is used outside its module. A model that is all in one precision is left alone. Autocast keeps no
    converted weights, since an analysis moves them.
    """
    full = _full_dtype(model)
    if full is None or computes_in_half(model) is None:
        yield
        return
    region = _Region(full)
    with intercepted(_half_modules(model), region.call), PromotedPrecision():
        try:
            yield
        except RuntimeError as error:
            if any(part in str(error).lower() for part in _OTHER_DTYPE):
                error.add_note(_REMEDY)
            raise


class _Region:
    """Runs the outermost half-precision modules under autocast."""

    def __init__(self, full: torch.dtype) -> None:
        self._full, self._is_inside = full, False

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._is_inside:
            return forward(*args, **kwargs)
        own = next(t for t in (*module.parameters(), *module.buffers()) if t.dtype in HALF)
        self._is_inside = True
        try:
            with torch.autocast(own.device.type, dtype=own.dtype, cache_enabled=False):
                output = forward(*args, **kwargs)
        finally:
            self._is_inside = False
        return self._converted(output)

    def _converted(self, output: Any) -> Any:
        if not any(map(_is_half, leaves_of(output))):
            return output
        return map_leaves(output, lambda leaf: leaf.to(self._full) if _is_half(leaf) else leaf)


def _half_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that hold half-precision tensors, and no floating-point parameter of another type."""
    found = []
    for module in model.modules():
        parameters = {p.dtype for p in module.parameters() if p.is_floating_point() or p.is_complex()}
        kinds = parameters or {b.dtype for b in module.buffers() if b.is_floating_point()}
        if len(kinds) == 1 and kinds <= {*HALF} and not is_opaque(module):
            found.append(module)
    return found


def _full_dtype(model: nn.Module) -> torch.dtype | None:
    """Type of the parameters in full precision, of the trainable ones if there are any; None where there are none."""
    full = [p for p in model.parameters() if p.dtype in {torch.float32, torch.float64}]
    chosen = [p for p in full if p.requires_grad] or full
    if not chosen:
        return None
    return torch.float64 if any(p.dtype == torch.float64 for p in chosen) else torch.float32


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in HALF
