"""Models partly in half precision, such as a frozen bfloat16 backbone below a float32 head, or a LoRA base model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis._shared.forwards import intercepted, is_opaque
from moe_heads.analysis._shared.promotion import HALF, PromotedPrecision
from moe_heads.routed_module import RoutedModule

__all__ = ["computes_in_half", "half_modules_in_autocast"]

# Parts of torch's error messages about tensors of different data types.
_OTHER_DTYPE = ("dtype", "scalar type", "data type", "expected scalar")

_REMEDY = (
    "A part of the model is in half precision. During an analysis, modules with parameters only in half precision run"
    " under autocast and all others in float32. Convert the tensors where the two meet, or analyze a copy in float32:"
    " callback.analyze(copy.deepcopy(model).float(), ...)."
)


def computes_in_half(model: nn.Module) -> torch.dtype | None:
    """Return the half-precision data type that a part of the model computes in, or None.

    The loss of such a model is accurate to the rounding of that type: about 3 digits for float16, 2 for bfloat16.

    Example:
        >>> import torch
        >>> from moe_heads.analysis._shared.half_precision import computes_in_half
        >>> computes_in_half(torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 1)))
        torch.bfloat16
    """
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    return next((dtype for dtype in HALF if dtype in found), None)


@contextmanager
def half_modules_in_autocast(model: nn.Module) -> Iterator[None]:
    """Evaluate half-precision parts of a model under autocast, and all other parts in full precision.

    A module whose parameters are all bfloat16 runs under autocast, as in training with ``precision="bf16-mixed"``. Its
    output is converted to the type of the other parameters. A module whose parameters are all float16 is computed in
    full precision from these weights. Other operations on mixed types, such as a custom LoRA layer or a weight that is
    used outside its module, are computed in full precision (`PromotedPrecision`). A model with a single precision is
    not changed. The weight cache of autocast is off, since an analysis changes the weights.
    """
    full = _full_dtype(model)
    if full is None or computes_in_half(model) is None:
        yield
        return
    region = _Region(model, full)
    with intercepted(region.modules, region.call), PromotedPrecision():
        try:
            yield
        except RuntimeError as error:
            if any(part in str(error).lower() for part in _OTHER_DTYPE):
                error.add_note(_REMEDY)
            raise


class _Region:
    """The half-precision modules of a model and the code that runs them.

    bfloat16 has the range of float32 and runs under autocast. In float16, the gradients of a mean over many samples
    underflow, and a second derivative has no loss scaling. These modules are therefore computed in full precision from
    their float16 weights. So are recurrent layers, which some devices do not support in half precision.
    """

    def __init__(self, model: nn.Module, full: torch.dtype) -> None:
        self.modules = _half_modules(model)
        self._full, self._is_inside = full, False

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(module, nn.RNNBase):
            return self._recurrent(module, forward, args, kwargs)
        device, dtype = self.modules[module]
        if dtype == torch.float16:
            # a head compares the data types of its input and its weights
            with self._full_weights(module if isinstance(module, RoutedModule) else None):
                return self._converted(forward(*args, **kwargs))
        if self._is_inside:
            return forward(*args, **kwargs)
        self._is_inside = True
        try:
            with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
                output = forward(*args, **kwargs)
        finally:
            self._is_inside = False
        return self._converted(output)

    @contextmanager
    def _full_weights(self, module: nn.Module | None) -> Iterator[None]:
        """Replace all parameters inside a module by copies in full precision while the block runs."""
        held = [child._parameters for child in ([] if module is None else module.modules())]
        before = [dict(parameters) for parameters in held]
        try:
            for parameters in held:
                parameters.update({name: self._in_full(parameter) for name, parameter in parameters.items()})
            yield
        finally:
            for parameters, own in zip(held, before, strict=True):
                parameters.update(own)

    def _recurrent(
        self, module: nn.RNNBase, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        weights = module._flat_weights
        args, kwargs = map_leaves((args, kwargs), self._in_full)
        full: list[Any] = [self._in_full(weight) for weight in weights]
        module._flat_weights = full
        try:
            with torch.autocast(self.modules[module][0].type, enabled=False):
                return forward(*args, **kwargs)
        finally:
            module._flat_weights = weights

    def _in_full(self, leaf: Any) -> Any:
        is_packed = isinstance(leaf, PackedSequence)
        return leaf.to(self._full) if _is_half(leaf.data if is_packed else leaf) else leaf

    def _converted(self, output: Any) -> Any:
        if not any(_is_half(leaf) or isinstance(leaf, PackedSequence) for leaf in leaves_of(output)):
            return output
        return map_leaves(output, self._in_full)


def _half_modules(model: nn.Module) -> dict[nn.Module, tuple[torch.device, torch.dtype]]:
    """Return the device and type of each module whose floating-point tensors all have one half-precision type."""
    found: dict[nn.Module, tuple[torch.device, torch.dtype]] = {}
    for module in model.modules():
        parameters: list[Tensor] = [p for p in module.parameters() if p.is_floating_point() or p.is_complex()]
        held = parameters or [b for b in module.buffers() if b.is_floating_point()]
        dtypes = {tensor.dtype for tensor in held}
        if len(dtypes) == 1 and dtypes <= {*HALF} and not is_opaque(module):
            found[module] = held[0].device, held[0].dtype
    return found


def _full_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the type of the full-precision parameters, preferably of the trainable ones, or None without any."""
    full = [p for p in model.parameters() if p.dtype in {torch.float32, torch.float64}]
    chosen = [p for p in full if p.requires_grad] or full
    if not chosen:
        return None
    return torch.float64 if any(p.dtype == torch.float64 for p in chosen) else torch.float32


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in HALF
