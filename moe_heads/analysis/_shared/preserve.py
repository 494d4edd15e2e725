"""Run an analysis on a model and leave no trace: all state is put back bit for bit, also after an error."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_heads.analysis._shared.contents import remember, write_back
from moe_heads.analysis._shared.generators import generator_states, restore_generators, seed_generators
from moe_heads.analysis._shared.half_precision import half_modules_in_autocast
from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.plain_paths import plain_paths

__all__ = ["Original", "analysis_mode", "preserved"]

Original = Callable[[Tensor], Tensor]
"""The values that a parameter or buffer had when the block began."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[Original]:
    """Put back, on leaving the block, whatever the block did to ``model`` and to the random number generators.

    Covers parameters, buffers, ``.grad``, ``requires_grad`` and train / eval flags, all other attributes of the model
    and its submodules (counters, lists, dicts, hidden states, the states of torchmetrics metrics), and the generators
    of Python, NumPy, torch and every CUDA device. Tensors and containers keep their identity, so optimizers and views
    stay attached. Costs one copy of the model's tensors while the block runs; gradients are put aside as they are, so
    that ``.grad`` is None in the block.

    Yields:
        What gives a parameter or buffer as it was when the block began: that copy, not to be written to.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import preserved
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> with preserved(layer):
        ...     _ = layer.weight.data.zero_()
        >>> torch.equal(layer.weight, before)
        True
    """
    # a lazy tensor has no values yet, and each analysis refuses it
    known = [t for t in dict.fromkeys([*model.parameters(), *model.buffers()]) if not _is_lazy(t)]
    tensors = [_TensorState(tensor) for tensor in known]
    taken_care_of = {id(value) for value in (*known, *model.modules())}
    attributes = [remember(vars(module), known=taken_care_of) for module in model.modules()]
    generators = generator_states()
    originals = {id(state.tensor): state.values for state in tensors}
    try:
        for tensor in tensors:
            tensor.put_grad_aside()
        yield lambda tensor: originals[id(tensor)]
    finally:
        with HeldInterrupts():
            for put_back in attributes:
                put_back()
            for tensor in tensors:
                tensor.restore()
            restore_generators(generators)


@contextmanager
def analysis_mode(model: nn.Module, seed: int = 0) -> Iterator[Original]:
    """State under which every analysis of this package evaluates a model, undone on leaving the block.

    Evaluation mode, gradients enabled, torch.compile off and the mathematical attention kernel (compiled code and the
    fused kernels have no second derivative), the same function with and without gradients (`plain_paths`), random
    number generators seeded with ``seed``. Autocast is off, except in the parts of a model whose weights are in half
    precision (`half_modules_in_autocast`). Then everything that `preserved` covers is put back.

    Args:
        model: The model to evaluate.
        seed: Seed of the generators inside the block; equal seeds give equal results.

    Yields:
        The values that a parameter or buffer had before; see `preserved`.
    """
    with ExitStack() as stack:
        original = stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(half_modules_in_autocast(model))
        stack.enter_context(plain_paths(model))
        seed_generators(seed)
        model.eval()
        yield original


class _TensorState:
    """Values, gradient, ``requires_grad`` flag and attributes of one parameter or buffer."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self.values = tensor.detach().clone()
        # torch.compile leaves marks on the tensors that it has seen
        self._attributes = dict(vars(tensor))

    def put_grad_aside(self) -> None:
        """Nobody writes into a gradient that is not there, so it needs no copy."""
        if self._grad is not None:
            self.tensor.grad = None

    def restore(self) -> None:
        write_back(self.tensor, self.values)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
            self.tensor.grad = self._grad
        vars(self.tensor).clear()
        vars(self.tensor).update(self._attributes)


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
