"""Floating point operations and operators of a call, by torch's own counter, and what that does not count."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["CONVENTION", "Counted", "Operator", "count"]

CONVENTION = (
    "two operations a multiply-add of matrix products, convolutions and attention; a sparse head counts its choices"
)


# what these read of their first argument is as large as what they write
_GATHERS = {"aten.index", "aten.index_select", "aten.gather", "aten.embedding"}


def _grouped_product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Rows (P, D) in groups, each times its own matrix of (E, D, H): torch's counter has no formula for it."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[2] if a.dim() == 2 and b.dim() == 3 else None


_FORMULAS: Mapping[Any, Callable[..., int | None]] = {torch.ops.aten._grouped_mm: _grouped_product, **flop_registry}


class Operator(NamedTuple):
    """One operator that ran.

    Attributes:
        flops: Floating point operations, two a multiply-add.
        num_bytes: Bytes that it read and wrote.
    """

    flops: int
    num_bytes: int


@dataclass(frozen=True)
class Counted:
    """What a call did.

    Attributes:
        operators: Those that ran, in order, views aside: in eager mode the kernels that were launched, about.
        uncounted: How often each operator ran whose arithmetic no formula is known for.
    """

    operators: tuple[Operator, ...]
    uncounted: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Floating point operations in all."""
        return sum(operator.flops for operator in self.operators)


def count(call: Callable[[], object]) -> Counted:
    """Run the call once and count, by the formulas of `torch.utils.flop_counter`.

    Args:
        call: What is counted.
    """
    recorder = _Recorder()
    # in the mode of the timed runs: outside of it a model may not write into what it made there
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), recorder:
        call()
    return Counted(tuple(recorder.operators), recorder.uncounted)


class _Recorder(TorchDispatchMode):
    """Notes the operators that run and are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # in inference mode composite operators arrive whole, and their products would go uncounted
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # a question about data types, or an empty tensor to be filled, does nothing
        if func.is_view or not tensors:
            return output
        formula, name = _FORMULAS.get(func.overloadpacket), str(func.overloadpacket)
        flops = None if formula is None else formula(*args, **kwargs, out_val=output)
        if flops is None:
            self.uncounted[name] += 1
        written = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        read = [*written, *tensors[1:]] if name in _GATHERS else tensors
        self.operators.append(Operator(int(flops or 0), sum(tensor.nbytes for tensor in (*read, *written))))
        return output
