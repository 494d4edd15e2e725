"""Floating point operations and operators of a call, and what was not counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_heads.analysis.inference_timing.formulas import FORMULAS, hides_products
from moe_heads.analysis.inference_timing.live_memory import LiveMemory, num_bytes

__all__ = ["CONVENTION", "Counted", "Operator", "Recorder", "count"]

CONVENTION = (
    "two operations a multiply-add of matrix products, convolutions, attention and recurrent layers; a sparse head "
    "counts its choices"
)


# what these read of their first argument is as large as what they write
_GATHERS = {"aten.index", "aten.index_select", "aten.gather", "aten.embedding"}


class Operator(NamedTuple):
    """One operator that ran.

    Attributes:
        flops: Floating point operations, two a multiply-add.
        num_bytes: Bytes that it read and wrote.
        uncounted: Its name, if there is no formula for it; "" if there is.
    """

    flops: int
    num_bytes: int
    uncounted: str = ""


@dataclass(frozen=True)
class Counted:
    """What a call did.

    Attributes:
        operators: Those that ran, in order, views aside: in eager mode the kernels that were launched, about.
    """

    operators: tuple[Operator, ...]

    @property
    def flops(self) -> int:
        """Floating point operations in all, of the operators that have a formula."""
        return sum(operator.flops for operator in self.operators)

    @property
    def uncounted(self) -> Mapping[str, int]:
        """How often each operator ran whose arithmetic no formula is known for."""
        return Counter(operator.uncounted for operator in self.operators if operator.uncounted)

    @property
    def num_hidden(self) -> int:
        """Operators without a formula that may do much arithmetic: with any, ``flops`` is a lower bound."""
        return sum(times for name, times in self.uncounted.items() if hides_products(name))


def count(call: Callable[[], object]) -> Counted:
    """Run the call once and count, by `FORMULAS`.

    Args:
        call: What is counted.
    """
    recorder = Recorder()
    # in the mode of the timed runs: outside of it a model may not write into what it made there
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), recorder:
        call()
    return Counted(tuple(recorder.operators))


class Recorder(TorchDispatchMode):
    """Notes the operators that run and are no views.

    Attributes:
        operators: They, in order.
        memory: The bytes of what they made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.memory = LiveMemory()
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing inside."""
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
        # in inference mode composite operators arrive whole, and their products would go uncounted
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        tensors = _tensors_in((args, kwargs))
        # a question about data types, or an empty tensor to be filled, does nothing
        if not func.is_view and tensors:
            self.operators.append(_operator(func, args, kwargs, tensors, output))
        self.memory.add(tensors, _tensors_in(output))
        return output


def _operator(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor], output: Any
) -> Operator:
    formula, name = FORMULAS.get(func.overloadpacket), str(func.overloadpacket)
    # torch's formulas know the shape of a sparse matrix, not how many of its entries there are
    is_dense = all(tensor.layout in {torch.strided, torch._mkldnn} for tensor in tensors)  # type: ignore[attr-defined]
    flops = formula(*args, **kwargs, out_val=output) if formula is not None and is_dense else None
    written = _tensors_in(output)
    read = [*written, *tensors[1:]] if name in _GATHERS else tensors
    moved = sum(num_bytes(tensor) for tensor in (*read, *written))
    return Operator(int(flops or 0), moved, name if flops is None else "")


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
