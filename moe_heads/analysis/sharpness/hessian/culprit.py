"""Which layer of a model an operation without a second derivative belongs to."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from moe_heads.analysis._shared.batches import leaves_of

__all__ = ["layer_of"]


def layer_of(model: nn.Module, run: Callable[[], object], message: str) -> str:
    """Name and class of the innermost module that runs the operation of which an error message speaks.

    Args:
        model: The model.
        run: Runs it once, with a graph.
        message: What torch said of the operation.

    Returns:
        Such as "encoder.attention (MultiheadAttention)"; "" where it is in no module.
    """
    found: list[str] = []
    seen: set[Node] = set()
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        # Modules inside and before have finished and are seen already: what is new is this module's own.
        new = _new_nodes(output, seen)
        if any(_is_meant(node, message) for node in new):
            found.append(f"{names[module] or 'the model itself'} ({type(module).__name__})")

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(look).remove)
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


def _is_meant(node: Node, message: str) -> bool:
    if "once_differentiable" in message:
        return isinstance(node, BackwardCFunction)
    # "derivative for aten::_some_operation_backward ..." is about the node SomeOperationBackward0
    spoken_of = re.sub(r"[^a-z0-9:. ]", "", message.lower())
    return bool(re.search(rf"\b{re.escape(_plain(node.name()))}backward\b", spoken_of))


def _plain(name: str) -> str:
    return re.sub(r"backward\d*$", "", re.sub(r"[^a-z0-9]", "", name.lower()))
