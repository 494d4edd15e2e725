"""Parameters and buffers of a network by name, and their comparison."""

from torch import Tensor, nn

from moe_heads.analysis.weight_matching.group import Tensors

__all__ = ["tensors_of", "unequal_shapes"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers of a model by name."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def unequal_shapes(first: Tensors, second: Tensors) -> str:
    """Return the first difference in names and shapes between two networks, or ""."""
    for name, tensor in first.items():
        if name not in second:
            return f"no {name}"
        if tensor.shape != second[name].shape:
            return f"{name} of shape {tuple(second[name].shape)} instead of {tuple(tensor.shape)}"
    return next((f"another tensor, {name}" for name in second if name not in first), "")
