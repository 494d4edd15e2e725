"""The update of an optimizer, by a dry step that is put back bit for bit or from the step that was made."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.generators import generators_kept
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.shards import local
from moe_heads.analysis._shared.state import snapshot, write_back

__all__ = ["Values", "check_has_update", "learning_rate_of", "made_update", "parameter_values", "update_of"]

Values = dict[str, Tensor]
"""Tensors by name of the parameter, in the shape of the part of this process."""


def update_of(optimizer: Optimizer, model: nn.Module) -> Values:
    """Return the parameter change that the next step of an optimizer would make with the current gradients.

    The step is made and put back. Parameters, gradients, the state of the optimizer (also what its first step creates),
    its parameter groups and all random generators are afterwards bit for bit what they were. The step hooks of the
    optimizer are not called. A sharded model needs this call in every process.

    Args:
        optimizer: The optimizer. Its parameters have their gradients, after clipping and without the factor of a
            gradient scaler.
        model: The model, for the names of the parameters.

    Returns:
        The change of each parameter of the optimizer, in its data type. Parameters without a gradient are left out.

    Raises:
        ValueError: If the optimizer needs a closure, a parameter is not part of the model, or there is no gradient.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import update_of
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> update_of(optimizer, model)["weight"], dict(optimizer.state)
        (tensor([[-0.5000]]), {})
    """
    check_has_update(optimizer)
    named = {name: p for name, p in _named_parameters(optimizer, model).items() if p.grad is not None}
    if not named:
        raise ValueError("optimizer: expected parameters with a gradient, got none. Call loss.backward() first.")
    before = {name: local(p).detach().clone() for name, p in named.items()}
    gradients = [p.grad for p in named.values()]
    with generators_kept(), _restored(optimizer, gradients, {id(p) for p in _all_parameters(optimizer)}):
        try:
            type(optimizer).step(optimizer)
            return {name: local(p).detach() - before[name] for name, p in named.items()}
        finally:
            with HeldInterrupts():
                for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                    write_back(local(parameter), before[name])
                    parameter.grad = gradient


def parameter_values(optimizer: Optimizer, model: nn.Module) -> Values:
    """Return copies of the parameters of an optimizer, to compute the `made_update` after its step."""
    return {name: local(p).detach().clone() for name, p in _named_parameters(optimizer, model).items()}


def made_update(model: nn.Module, before: Mapping[str, Tensor]) -> Values:
    """Return the parameter change since ``before``, the result of `parameter_values`."""
    named = dict(model.named_parameters())
    return {name: local(named[name]).detach() - values for name, values in before.items()}


def check_has_update(optimizer: Optimizer) -> None:
    """Check that an optimizer has an update that depends on its gradients and state alone.

    Raises:
        ValueError: If its step needs a closure, as that of LBFGS.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer!r}.")
    step = inspect.signature(type(optimizer).step).parameters
    required = [name for name, parameter in list(step.items())[1:] if _is_required(parameter)]
    if required:
        raise ValueError(
            f"optimizer: expected an optimizer with an update direction, got {type(optimizer).__name__}, whose step"
            f" needs the argument {required[0]!r}: it evaluates the loss several times in one step. Use an optimizer"
            " that steps from the gradient, such as SGD or AdamW."
        )


def learning_rate_of(optimizer: Optimizer) -> float | None:
    """Return the learning rate of an optimizer; None if its parameter groups have different ones, or not above 0."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if group["params"] and "lr" in group}
    rate = rates.pop() if len(rates) == 1 else 0.0
    return rate if rate > 0 else None


def _is_required(parameter: inspect.Parameter) -> bool:
    is_named = parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    return is_named and parameter.default is parameter.empty


def _all_parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _named_parameters(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    parameters = list(_all_parameters(optimizer))
    if any(id(p) not in names for p in parameters):
        raise ValueError(
            "optimizer: expected parameters of the model, got one that is no part of it. Pass the optimizer of this"
            " model, or the model that holds all parameters of the optimizer."
        )
    return {names[id(p)]: p for p in parameters}


@contextmanager
def _restored(optimizer: Optimizer, gradients: list[Any], parameters: set[int]) -> Iterator[None]:
    """Put back the gradients and everything in an optimizer except its parameters, and silence its step hooks."""
    restore: list[Callable[[], Any]] = [snapshot(gradients), snapshot(vars(optimizer), known=parameters)]
    attributes: Any = optimizer
    attributes._optimizer_step_pre_hooks = OrderedDict()
    attributes._optimizer_step_post_hooks = OrderedDict()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        with HeldInterrupts():
            for each in restore:
                each()
