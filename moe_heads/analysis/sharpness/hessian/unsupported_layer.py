"""Find the layer of a model that has no second derivative."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from moe_heads.analysis._shared.batches import leaves_of

__all__ = ["unsupported_layer"]


def unsupported_layer(model: nn.Module, run: Callable[[], object], message: str) -> str:
    """Return the name and class of the innermost module that runs the operation named in an error message.

    Args:
        model: The model.
        run: Runs the model once, with a graph.
        message: Message of torch about the operation.

    Returns:
        Text such as "encoder.attention (MultiheadAttention)"; "" for an operation outside all modules.
    """
    found: list[str] = []
    seen: set[Node] = set()
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # Inner and earlier modules have recorded their nodes already, so the new ones are this module's own.
        new = _new_nodes(output, seen)
        if any(_is_named(node, message) for node in new):
            found.append(f"{names[module] or 'the model itself'} ({type(module).__name__})")

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(record).remove)
        run()
    return found[0] if found else ""


def _new_nodes(output: Any, seen: set[Node]) -> list[Node]:
    waiting = [leaf.grad_fn for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
    new: list[Node] = []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            new.append(node)
            waiting.extend(following for following, _ in node.next_functions)
    return new


def _is_named(node: Node, message: str) -> bool:
    if "once_differentiable" in message:
        return isinstance(node, BackwardCFunction)
    # "derivative for aten::_some_operation_backward ..." names the node SomeOperationBackward0.
    named = re.sub(r"[^a-z0-9:. ]", "", message.lower())
    return bool(re.search(rf"\b{re.escape(_plain(node.name()))}backward\b", named))


def _plain(name: str) -> str:
    return re.sub(r"backward\d*$", "", re.sub(r"[^a-z0-9]", "", name.lower()))
