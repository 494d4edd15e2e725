"""Checks of the graph of a loss for a second derivative, and the memory of that graph."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from moe_heads.analysis._shared.scalar import checked_scalar

__all__ = [
    "NoSecondDerivative",
    "check_checkpoints",
    "checked_loss",
    "gradient_with_graph",
    "has_custom_function",
    "saved_bytes",
    "second_order_errors",
]

# Parts of torch's error messages for a missing second derivative: formulas, custom functions, torch.compile.
_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "once_differentiable",
    "double backward",
    "differentiate twice",
    "donated buffers",
)


class NoSecondDerivative(RuntimeError):
    """Error for a layer that cannot be differentiated twice."""


def checked_loss(loss: object, index: int) -> Tensor:
    """Return the loss of batch ``index`` after checking it. It may depend on no parameter, as with an idle expert.

    Raises:
        ValueError: If it is not a finite scalar tensor, or went through a reentrant checkpoint (``torch.autograd.grad``
            would silently lose what lies inside).
    """
    where = f"of batch {index}"
    loss = checked_scalar(loss, f"the mean loss {where}")
    if not bool(loss.isfinite().all()):
        raise ValueError(f"loss_fn: expected a finite loss, got {loss.item()} as the loss {where}")
    check_checkpoints(loss)
    return loss.reshape(())


def check_checkpoints(loss: Tensor) -> None:
    """Raise for a loss whose graph contains a reentrant checkpoint.

    ``torch.autograd.grad`` silently loses what lies inside, also for parameters that are not selected.

    Raises:
        ValueError: If the graph contains one.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes([loss])):
        raise ValueError(
            "model: expected checkpoint(..., use_reentrant=False), got reentrant checkpointing. Its second derivatives"
            " are silently wrong."
        )


def has_custom_function(loss: Tensor) -> bool:
    """Return whether the graph of a loss contains a custom autograd function."""
    return any(isinstance(node, BackwardCFunction) for node in _nodes([loss]))


def gradient_with_graph(loss: Tensor, params: Sequence[Tensor], cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return a gradient that can be differentiated again, with zeros for unused parameters.

    Args:
        loss: The loss, or another tensor with a ``cotangent``.
        params: The parameters.
        cotangent: A tensor that requires a gradient, of the shape of ``loss``; by default 1.

    Raises:
        NoSecondDerivative: If a layer has none, as far as torch detects it here.
    """
    # A function with a once-differentiable backward leaves its error node only when the gradient that enters it
    # requires a gradient, so the first of them does. torch never runs that node, because it leads to no parameter. The
    # product would silently lack the contribution of the function.
    one = torch.ones_like(loss, requires_grad=True) if cotangent is None else cotangent
    with second_order_errors():
        gradient = torch.autograd.grad(loss, params, one, create_graph=True, allow_unused=True, materialize_grads=True)
        if any(node.name() == "torch::autograd::Error" for node in _nodes(gradient)):
            raise NoSecondDerivative("a custom autograd function is marked once_differentiable")
    return gradient


@contextmanager
def second_order_errors() -> Iterator[None]:
    """Add cause and remedy to the error of a layer that has no second derivative.

    Raises:
        NoSecondDerivative: Instead of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _NO_SECOND_DERIVATIVE):
            raise
        raise NoSecondDerivative(
            f"a layer of the model has no second derivative ({error}). For the analysis use its plain form: torch "
            "operations instead of a custom autograd function or a fused activation, attention inside analysis_mode"
            " (mathematical kernel); on a GPU, torch.backends.cudnn.flags(enabled=False) for recurrent layers."
        ) from error


def saved_bytes(compute: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Return the bytes that the graph built by ``compute()`` holds for backward, each storage once.

    Args:
        compute: Builds the graph and returns an object that keeps it alive.
        excluded: Tensors whose memory is not counted, because it is held anyway.
    """
    held = {p.untyped_storage().data_ptr() for p in excluded}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = compute()
    total = sum(size for pointer, size in sizes.items() if pointer not in held)
    del graph
    return total


def _nodes(tensors: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node
