"""Floating point operations and memory traffic of the operators of a call, with marks for uncounted operators.

The formulas are those of `torch.utils.flop_counter`, completed by operators that it lacks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["CONVENTION", "FORMULAS", "FlopCount", "Operator", "OperatorLog", "OperatorRecorder", "record"]

CONVENTION = (
    "two operations a multiply-add of matrix products, convolutions, attention and recurrent layers; a sparse head "
    "counts its choices"
)

# operators that read only as many entries of their first argument as they write
_GATHERS = {"aten.index", "aten.index_select", "aten.gather", "aten.embedding"}

# words in the names of operators that may perform matrix products or comparable arithmetic
_PRODUCTS = {
    *("dot", "vdot", "matmul", "conv", "convolution", "linear", "attention", "transformer", "trilinear", "addr"),
    *("rnn", "lstm", "gru", "cdist", "pdist", "linalg", "fft", "solve", "cholesky", "svd", "inverse", "geqrf"),
}


class FlopCount(NamedTuple):
    """Number of floating point operations, which is a lower bound unless it is complete."""

    value: int
    is_complete: bool = True


class Operator(NamedTuple):
    """Operations, and bytes read and written, of an executed operator; ``uncounted`` is its name without a formula."""

    flops: int
    num_bytes: int
    uncounted: str = ""


@dataclass(frozen=True)
class OperatorLog:
    """Operators of a call in order, without views: in eager mode about one kernel launch each."""

    operators: tuple[Operator, ...]

    @property
    def flops(self) -> int:
        """Floating point operations of all operators with a formula."""
        return sum(operator.flops for operator in self.operators)

    @property
    def uncounted(self) -> Mapping[str, int]:
        """Number of runs of each operator without a formula, by name."""
        return Counter(operator.uncounted for operator in self.operators if operator.uncounted)

    @property
    def num_hidden(self) -> int:
        """Number of operators without a formula that may be expensive; if any, ``flops`` is a lower bound."""
        return sum(times for name, times in self.uncounted.items() if _may_be_expensive(name))


def record(function: Callable[[], object]) -> OperatorLog:
    """Run a function once in inference mode and return its operators."""
    recorder = OperatorRecorder()
    # Inference mode as in the timed runs: outside, a model could not modify tensors that it created in inference mode.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), recorder:
        function()
    return OperatorLog(tuple(recorder.operators))


class OperatorRecorder(TorchDispatchMode):
    """Dispatch mode that records every executed operator except views in ``operators``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in the enclosed block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        # inference mode dispatches composite operators as a whole, which would hide their products
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        tensors = _tensors_in((args, kwargs))
        # operators without tensor arguments query a data type or allocate memory
        if not func.is_view and tensors:
            self.operators.append(_operator(func, args, kwargs, tensors, output))
        return output


def _operator(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor], output: Any
) -> Operator:
    formula, name = FORMULAS.get(func.overloadpacket), str(func.overloadpacket)
    # torch's formulas use the shape of a sparse matrix and not its number of entries
    is_dense = all(tensor.layout in {torch.strided, torch._mkldnn} for tensor in tensors)  # type: ignore[attr-defined]
    flops = formula(*args, **kwargs, out_val=output) if formula is not None and is_dense else None
    written = _tensors_in(output)
    read = [*written, *tensors[1:]] if name in _GATHERS else tensors
    return Operator(int(flops or 0), sum(map(_num_bytes, (*read, *written))), name if flops is None else "")


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of the entries of a tensor; a sparse one includes its indices, 8 bytes per dimension."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.is_sparse or tensor.is_sparse_csr:
        return tensor._nnz() * (tensor.element_size() + 8 * tensor.dim())
    return tensor.numel() * tensor.element_size()


def _may_be_expensive(name: str) -> bool:
    """Return whether an operator such as "aten.relu" may need more than a few operations per element.

    The words of the name decide. Nothing is known about operators from outside torch, so they count as expensive.
    """
    namespace, _, rest = name.partition(".")
    if namespace not in {"aten", "prims", "profiler"}:
        return True
    words = rest.strip("_").split("_")
    return "norm" not in words and any(word in _PRODUCTS or word.endswith(("mm", "mv")) for word in words)


def _grouped_product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Count grouped products: rows (P, D) in groups, each group times its own matrix of (E, D, H)."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[2] if a.dim() == 2 and b.dim() == 3 else None


def _attention(x: Tensor, weights: Iterable[Tensor]) -> int:
    """Count 2 per token of x (B, T, D) and weight, and 2 T² D for each of Q Kᵀ and A V; nested x has no padding."""
    lengths = x._nested_tensor_size()[:, 0].tolist() if x.is_nested else [x.shape[1]] * x.shape[0]
    per_token = sum(weight.numel() for weight in weights)
    return sum(2 * length * per_token + 4 * length**2 * x.size(2) for length in lengths)


def _encoder_layer(x: Tensor, width: int, num_heads: int, *args: Any, **kwargs: Any) -> int:
    qkv, _, projection, *_, first, _, second, _ = args[:15]
    return _attention(x, (qkv, projection, first, second))


def _attention_layer(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int | None:
    return _attention(query, (args[2], args[4])) if query is key and key is value else None


def _recurrent(x: Tensor, weights: Iterable[Tensor], *args: Any, **kwargs: Any) -> int:
    """Count each step of x (T, B, D), or packed, times the matrices of all layers and directions."""
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
    # only the gates: the products of these cells run as separate operators
    _aten._thnn_fused_lstm_cell: lambda *args, **kwargs: 0,
    _aten._thnn_fused_gru_cell: lambda *args, **kwargs: 0,
    **flop_registry,
}
"""``formula(*args, out_val=output, **kwargs)`` by operator; the result is None where the formula does not apply.

They extend a copy of torch's registry. Global registration would change the counts of the user's own `FlopCounterMode`.
"""
