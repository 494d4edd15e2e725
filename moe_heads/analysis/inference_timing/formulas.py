"""Floating point operations by operator, two a multiply-add: torch's formulas, and those that it lacks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["FORMULAS", "hides_products"]

_PRODUCTS = {
    *("dot", "vdot", "matmul", "conv", "convolution", "linear", "attention", "transformer", "trilinear", "addr"),
    *("rnn", "lstm", "gru", "cdist", "pdist", "linalg", "fft", "solve", "cholesky", "svd", "inverse", "geqrf"),
}


def hides_products(name: str) -> bool:
    """Whether an operator without a formula may do more than a few operations an element, by the words of its name.

    Of kernels from outside of torch nothing is known, so they may.

    Args:
        name: Such as "aten.relu".
    """
    namespace, _, rest = name.partition(".")
    if namespace not in {"aten", "prims", "profiler"}:
        return True
    words = rest.strip("_").split("_")
    return "norm" not in words and any(word in _PRODUCTS or word.endswith(("mm", "mv")) for word in words)


def _grouped_product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Rows (P, D) in groups, each times its own matrix of (E, D, H)."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[2] if a.dim() == 2 and b.dim() == 3 else None


def _attention(x: Tensor, weights: Iterable[Tensor]) -> int:
    """Each token of x (B, T, D) times all weights, and twice T² D for Q Kᵀ and A V; a nested tensor has no padding."""
    lengths = x._nested_tensor_size()[:, 0].tolist() if x.is_nested else [x.shape[1]] * x.shape[0]
    per_token = sum(weight.numel() for weight in weights)
    return sum(2 * length * per_token + 4 * length**2 * x.size(2) for length in lengths)


def _encoder_layer(x: Tensor, width: int, num_heads: int, *args: Any, **kwargs: Any) -> int:
    qkv, _, projection, *_, first, _, second, _ = args[:15]
    return _attention(x, (qkv, projection, first, second))


def _attention_layer(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int | None:
    return _attention(query, (args[2], args[4])) if query is key and key is value else None


def _recurrent(x: Tensor, weights: Iterable[Tensor], *args: Any, **kwargs: Any) -> int:
    """Each step of x (T, B, D), or packed, times the matrices of all layers and directions."""
    return 2 * x.shape[:-1].numel() * sum(weight.numel() for weight in weights if weight.dim() == 2)


_aten = torch.ops.aten
FORMULAS: Mapping[Any, Callable[..., int | None]] = {
    _aten._grouped_mm: _grouped_product,
    _aten.dot: lambda a, *args, **kwargs: 2 * a.numel(),
    _aten.vdot: lambda a, *args, **kwargs: 2 * a.numel(),
    _aten.mv: lambda matrix, *args, **kwargs: 2 * matrix.numel(),
    _aten.addmv: lambda added, matrix, *args, **kwargs: 2 * matrix.numel(),
    _aten._transformer_encoder_layer_fwd: _encoder_layer,
    _aten._native_multi_head_attention: _attention_layer,
    _aten.mkldnn_rnn_layer: lambda x, *args, **kwargs: _recurrent(x, args[:2]),
    _aten._cudnn_rnn: _recurrent,
    _aten.miopen_rnn: _recurrent,
    # the gates alone: their products come as operators of their own
    _aten._thnn_fused_lstm_cell: lambda *args, **kwargs: 0,
    _aten._thnn_fused_gru_cell: lambda *args, **kwargs: 0,
    **flop_registry,
}
"""``formula(*args, out_val=output, **kwargs)`` of an operator; None where it does not apply."""
