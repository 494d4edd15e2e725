"""Run an analysis on a model and leave no trace: all state is put back bit for bit, also after an error."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["analysis_mode", "preserved", "seed_generators"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving the block, whatever the block did to ``model`` and to the random number generators.

    Covers parameters, buffers, ``.grad``, ``requires_grad`` and train / eval flags, the states of torchmetrics
    metrics inside the model, and the generators of Python, NumPy, torch and every CUDA device. The tensors keep their
    identity, so optimisers and views stay attached. Costs one copy of the model's tensors while the block runs.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional import preserved
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> with preserved(layer):
        ...     _ = layer.weight.data.zero_()
        >>> torch.equal(layer.weight, before)
        True
    """
    modules = [_ModuleState(module) for module in model.modules()]
    # a lazy tensor has no values yet, and each analysis refuses it
    known = [t for t in dict.fromkeys([*model.parameters(), *model.buffers()]) if not _is_lazy(t)]
    tensors = [_TensorState(tensor) for tensor in known]
    generators = _generator_states()
    try:
        yield
    finally:
        for module in modules:
            module.restore()
        for tensor in tensors:
            tensor.restore()
        _restore_generators(generators)


@contextmanager
def analysis_mode(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """State under which every analysis of this package evaluates a model, undone on leaving the block.

    Evaluation mode, gradients enabled, autocast off, the mathematical attention kernel (the fused ones have no
    second derivative), random number generators seeded with ``seed``; then everything that `preserved` covers is put
    back.

    Args:
        model: The model to evaluate.
        seed: Seed of the generators inside the block; equal seeds give equal results.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        seed_generators(seed)
        model.eval()
        yield


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _ModuleState:
    """Flags, tensor slots and metric state of one module, its children not included."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._training = module.training
        self._parameters = dict(module._parameters)
        self._buffers = dict(module._buffers)
        self._metric = _metric_attributes(module) if isinstance(module, torchmetrics.Metric) else {}

    def restore(self) -> None:
        self._module.training = self._training
        _restore_slots(self._module._parameters, self._parameters)
        _restore_slots(self._module._buffers, self._buffers)
        vars(self._module).update(self._metric)


class _TensorState:
    """Values, gradient and ``requires_grad`` flag of one parameter or buffer."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._values = tensor.detach().clone()
        self._grad_values = None if self._grad is None else self._grad.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        self._tensor.data.copy_(self._values)
        if self._tensor.is_leaf:
            self._tensor.requires_grad_(self._requires_grad)
            self._tensor.grad = self._grad
        if self._grad is not None and self._grad_values is not None:
            self._grad.data.copy_(self._grad_values)


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _restore_slots(slots: dict[str, Any], saved: dict[str, Any]) -> None:
    if slots.keys() != saved.keys() or any(slots[name] is not saved[name] for name in saved):
        slots.clear()
        slots.update(saved)


def _metric_attributes(metric: torchmetrics.Metric) -> dict[str, Any]:
    """Plain attributes of a metric, its state among them; copies where an update would write in place."""
    return {name: _copied(value) for name, value in vars(metric).items() if not name.startswith("_modules")}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


def _generator_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_generators(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
