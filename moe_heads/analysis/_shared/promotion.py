"""Type promotion for operations that torch does not support on mixed data types."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["HALF", "PromotedPrecision"]

HALF = (torch.bfloat16, torch.float16)
"""The half-precision data types, the coarser one first."""

# Autocast does not cover these on a CPU.
_NORMS: frozenset[Any] = frozenset({
    *(F.layer_norm, F.batch_norm, F.group_norm, F.instance_norm, F.rms_norm, F.bilinear),
    *(torch.layer_norm, torch.batch_norm, torch.group_norm, torch.instance_norm, torch.rms_norm, torch.bilinear),
})

_PRODUCTS: frozenset[Any] = frozenset({
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward, F.prelu, F.grid_sample),
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.inner, torch.einsum, torch.tensordot),
    *(torch.addmm, torch.addmv, torch.baddbmm, torch.addbmm, torch.lerp, torch.linalg.multi_dot),
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot),
    *(Tensor.inner, Tensor.addmm, Tensor.addmv, Tensor.baddbmm, Tensor.addbmm, Tensor.lerp),
})


class PromotedPrecision(TorchFunctionMode):
    """A torch function mode that computes operations on mixed half and full precision in full precision.

    torch promotes the arguments of most operations, but raises an error for different data types in matrix products,
    convolutions and norms. Inside the block their half-precision arguments are converted, which is exact. Products
    under autocast are not changed.

    Example:
        >>> import torch
        >>> from moe_heads.analysis._shared.promotion import PromotedPrecision
        >>> with PromotedPrecision():
        ...     torch.ones(1, 2) @ torch.ones(2, 1, dtype=torch.bfloat16)
        tensor([[2.]])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _NORMS or func in _PRODUCTS:
            tensors = list(_tensors((args, tuple(given.values()))))
            wanted = _full_precision(tensors)
            if wanted is not None and (func in _NORMS or not _is_autocast(tensors[0])):
                args, given = _converted((args, given), wanted)
        return func(*args, **given)


def _full_precision(tensors: list[Tensor]) -> torch.dtype | None:
    """Return the data type to compute in, or None unless half and full precision are mixed."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    full = dtypes & {torch.float32, torch.float64}
    if not full or dtypes.isdisjoint(HALF):
        return None
    return torch.float64 if torch.float64 in full else torch.float32


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in HALF else value
    if isinstance(value, dict):
        return {key: _converted(part, dtype) for key, part in value.items()}
    if type(value) in {list, tuple}:
        return cast(Any, type(value))(_converted(part, dtype) for part in value)
    return value
