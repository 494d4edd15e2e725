"""Folding of batch norms into convolutions and linear layers, exact in evaluation mode and cheaper to differentiate."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Fold", "find_folds", "folded", "has_norms"]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Fold:
    """A layer and the batch norm that takes its output."""

    layer: nn.Module
    norm: nn.Module


def has_norms(model: nn.Module) -> bool:
    """Return whether the model has a batch norm in evaluation mode, which can be folded."""
    return any(_is_norm(module) for module in model.modules())


def find_folds(model: nn.Module, run: Callable[[], object]) -> list[Fold]:
    """Return the convolutions and linear layers that a batch norm in evaluation mode follows in ``run()``.

    Each module is called once and has no hooks. This function cannot detect other uses of the layer's output, so the
    caller compares the folded model with the plain one.

    Args:
        model: The model.
        run: Runs the model once.
    """
    layers = [module for module in model.modules() if _is_layer(module)]
    norms = [module for module in model.modules() if _is_norm(module)]
    outputs: list[tuple[nn.Module, Tensor, int]] = []
    inputs: list[tuple[nn.Module, Tensor, int]] = []

    def record_output(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append((module, output, output._version))

    def record_input(module: nn.Module, args: Any) -> None:
        # The version shows whether the layer's output was changed in place in between.
        inputs.append((module, args[0], args[0]._version))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record_output).remove)
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(record_input).remove)
        run()
    pairs = [
        Fold(layer, norm)
        for layer, output, before in outputs
        for norm, argument, after in inputs
        if argument is output and before == after and (not isinstance(layer, nn.Linear) or output.dim() == 2)
    ]
    calls = [module for module, *_ in outputs + inputs]
    return [pair for pair in pairs if calls.count(pair.layer) == calls.count(pair.norm) == 1]


@contextmanager
def folded(folds: list[Fold]) -> Iterator[None]:
    r"""Fold the norms inside the block: a layer uses :math:`W\gamma/\sigma`, and a norm returns its input.

    The weights are differentiable in W, :math:`\gamma` and :math:`\beta`, so gradients and products are those of the
    plain model.
    """
    changed: list[nn.Module] = []
    try:
        for fold in folds:
            changed += [fold.layer, fold.norm]
            fold.layer.forward = partial(_both, fold.layer, fold.norm)
            fold.norm.forward = _identity
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _identity(x: Tensor) -> Tensor:
    return x


def _both(layer: Any, norm: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, shift)
    convolve = _CONVOLUTIONS[type(layer)]
    return convolve(x, weight, shift, layer.stride, layer.padding, layer.dilation, layer.groups)


def _is_layer(module: nn.Module) -> bool:
    if type(module) not in {*_CONVOLUTIONS, nn.Linear} or not _is_plain(module):
        return False
    return isinstance(module, nn.Linear) or cast(nn.Conv2d, module).padding_mode == "zeros"


def _is_norm(module: nn.Module) -> bool:
    is_constant = isinstance(module, _NORMS) and not module.training and module.running_mean is not None
    return is_constant and type(module) in _NORMS and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call runs only ``forward``, and that is the class's own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
