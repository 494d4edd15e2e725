"""Weights in float32 in place of half-precision weights, for an analysis of their curvature."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.memory import memory_budget
from moe_heads.analysis._shared.promotion import HALF

__all__ = ["Float32Copy", "float32_weights"]


class Float32Copy:
    """Copy of a model's half-precision weights in float32: its size, and whether an analysis uses it.

    Trainable weights need the copy, because the curvature of half-precision weights is lost in rounding errors. Frozen
    ones (the base model of an adapter) get it if it fits into half of the free memory. Otherwise they run under
    autocast, as in training.

    Args:
        model: The model.

    Attributes:
        name: Name of a parameter in half precision, preferably of a trainable one, or "" without any.
        num_bytes: Size of the copy.
        is_used: Whether an analysis uses the copy.

    Example:
        >>> import torch
        >>> from moe_heads.analysis._shared.float32_weights import Float32Copy
        >>> copy = Float32Copy(torch.nn.Linear(2, 1).bfloat16())
        >>> copy.name, copy.num_bytes, copy.is_used
        ('weight', 12, True)
    """

    def __init__(self, model: nn.Module) -> None:
        half = {name: p for name, p in model.named_parameters() if p.dtype in HALF}
        trainable = [name for name, p in half.items() if p.requires_grad]
        self.name = next(iter([*trainable, *half]), "")
        self.num_bytes = 4 * sum(p.numel() for p in half.values())
        self._is_needed = bool(trainable)
        budget = memory_budget(device_of(model), on_cpu=sys.maxsize, share_of_gpu=0.5)
        self.is_used = bool(half) and (self._is_needed or self.num_bytes <= budget)

    def message(self) -> str:
        """Return the sentences that say how the weights are evaluated, "" without weights in half precision."""
        if not self.name:
            return ""
        size = f"{self.num_bytes / 2**30:.2g} GiB"
        if self.is_used:
            return f"{self.name!r} is in half precision: a copy in float32 is analyzed, {size} during an analysis"
        return (
            f"{self.name!r} and other frozen weights are in half precision and run under autocast, as in training: a"
            f" copy in float32, {size}, takes more than half of the free memory. The curvature is as accurate as that"
            " precision"
        )


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Replace the half-precision parameters and buffers of a model by copies in float32 while the block runs.

    The model's own tensors are untouched, so optimizers, gradients and the hooks of DistributedDataParallel stay
    attached to them. Tied parameters stay tied.

    Args:
        model: The model.
    """
    copies: dict[int, Tensor] = {}

    def copy_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in HALF:
            return tensor
        if id(tensor) not in copies:
            full = tensor.detach().to(torch.float32)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if is_parameter else full
        return copies[id(tensor)]

    held = [tensors for module in model.modules() for tensors in (module._parameters, module._buffers)]
    before = [dict(tensors) for tensors in held]
    try:
        for tensors in held:
            tensors.update({name: copy_of(tensor) for name, tensor in tensors.items()})  # type: ignore[misc]
        yield
    finally:
        with HeldInterrupts():
            for tensors, own in zip(held, before, strict=True):
                tensors.update(own)  # type: ignore[arg-type]
