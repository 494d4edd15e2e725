"""Predicates for the execution mode of torch: recorded, transformed, inside backward.

Most of them have no public function. torch itself queries the same private ones.
"""

import torch
from torch import Tensor

__all__ = ["can_read_values", "can_read_without_sync", "in_backward", "is_transformed", "is_vmapped"]


def is_transformed() -> bool:
    """Return whether a transform of torch.func is active."""
    return torch._C._functorch.maybe_current_level() is not None


def is_vmapped() -> bool:
    """Return whether the call is inside `torch.vmap`, at any depth."""
    if not is_transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


def can_read_without_sync(values: Tensor) -> bool:
    """Return whether the host can read the values of a tensor without waiting for a device."""
    return values.device.type == "cpu" and can_read_values(values)


def can_read_values(x: Tensor) -> bool:
    """Return whether the host can read values computed from x: only in eager mode, without tracing or capture."""
    if torch.compiler.is_compiling():
        return False
    return not (
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
        or is_vmapped()
        or x.is_meta
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def in_backward() -> bool:
    """Return whether the autograd engine runs this code, as in the second pass of gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
