"""Trace of a loss: which positions of the parameters have to be permuted together."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis.weight_matching.expert_group import ExpertGroup
from moe_heads.analysis.weight_matching.group import Group
from moe_heads.analysis.weight_matching.mixtures import Mixture, is_mixture, trace_mixture
from moe_heads.analysis.weight_matching.rules import RULES
from moe_heads.analysis.weight_matching.unit_groups import unit_groups
from moe_heads.analysis.weight_matching.units import TracedTensors, UnitTable

__all__ = ["find_groups"]


def find_groups(model: nn.Module, loss_fn: LossFn, batch: Batch) -> list[Group]:
    """Return the groups of positions that can be permuted without a change of the loss, in the order of the pass.

    The loss of one batch is computed. Functions without a rule keep the order of their inputs. The groups follow from
    the rules of the functions, and a caller checks them on the loss.

    Args:
        model: The model, in evaluation mode.
        loss_fn: The loss.
        batch: A batch on the device of the model.

    Returns:
        The groups. Inputs and outputs keep their order.
    """
    table = UnitTable()
    traced = TracedTensors(table)
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in named.values():
        traced.put(tensor, [table.fresh(size) for size in tensor.shape])
    mode = _Tracer(traced)
    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if is_mixture(module):
                stack.enter_context(_as_one(name, module, mode))
        with mode:
            loss_fn(model, own_copy(batch))
    used = {name: tensor for name, tensor in named.items() if id(tensor) in mode.used}
    axes = {name: tuple(map(table.find, traced.of(tensor))) for name, tensor in used.items()}
    groups: list[Group] = [*unit_groups(axes), *mode.experts]
    return _with_unique_names(sorted(groups, key=lambda group: group.order))


def _with_unique_names(groups: list[Group]) -> list[Group]:
    """Number the groups with the name of another one: parts of a layer's outputs may be permuted separately."""
    counts = Counter(group.name for group in groups)
    numbers: Counter[str] = Counter()
    named: list[Group] = []
    for group in groups:
        numbers[group.name] += 1
        number, count = numbers[group.name], counts[group.name]
        named.append(group if count == 1 else group.renamed(f"{group.name} ({number} of {count})"))
    return named


class _Tracer(TorchFunctionMode):
    """A mode that applies the rule of each function.

    Attributes:
        used: Identities of the tensors that a function received.
        experts: Groups of experts that the pass met.
    """

    def __init__(self, traced: TracedTensors) -> None:
        super().__init__()
        self.traced = traced
        self.used: set[int] = set()
        self.experts: list[ExpertGroup] = []
        self.depth = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        if not self.depth:
            self._follow(func.__name__.strip("_"), output, args, named)
        return output

    def _follow(self, name: str, output: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = [leaf for leaf in tree_leaves((args, dict(named))) if isinstance(leaf, Tensor) and leaf in self.traced]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not inputs or not outputs:
            return  # nothing with units, or a question such as the shape
        self.used.update(map(id, inputs))
        axes = None
        if name in RULES:
            try:
                axes = RULES[name](self.traced, output, *args, **named)
            except (TypeError, ValueError, IndexError):
                axes = None  # a call with arguments that the rule does not know
        if axes is not None and [len(axis) for axis in axes] == list(output.shape):
            self.traced.put(output, axes)
            return
        for tensor in inputs:
            self.traced.fix(tensor)


@contextmanager
def _as_one(name: str, module: Mixture, mode: _Tracer) -> Iterator[None]:
    """Trace a mixture of experts as one function while the block runs."""

    def before(module: nn.Module, args: Any) -> None:
        mode.depth += 1

    def after(module: Any, args: Any, output: Any) -> None:
        mode.depth -= 1
        if mode.depth == 0:
            mode.used.update(map(id, [*module.parameters(), *module.buffers()]))
            known = [group.name for group in mode.experts]
            mode.experts += trace_mixture(name, module, args[0], output, mode.traced, known)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
