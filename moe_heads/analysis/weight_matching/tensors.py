"""Parameters and buffers of a network by name, and their comparison."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from moe_heads.analysis.weight_matching.group import Tensors

__all__ = ["checked_tensors", "tensors_of", "unequal_shapes", "with_aliases"]


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


def checked_tensors(model: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and buffers of another network by the names of `tensors_of`.

    Args:
        model: A network of the same structure.
        other: The other network, or its tensors by name, such as its state dict.

    Raises:
        ValueError: If the names or shapes differ.
    """
    known = tensors_of(model)
    if isinstance(other, nn.Module):
        given = tensors_of(other)
    else:
        aliases, stored = dict(_aliases(model)), set(model.state_dict())
        # a state dict has tied tensors under each of their names, and no buffers that are not persistent
        given = {name: tensor for name, tensor in known.items() if name not in stored}
        given |= {name: tensor for name, tensor in other.items() if name not in aliases}
    if reason := unequal_shapes(known, given):
        raise ValueError(f"other: expected the names and shapes of the model, got {reason}.")
    return given


def with_aliases(model: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors with those of tied weights under each of their names, as a state dict has them."""
    return {**tensors, **{alias: tensors[name] for alias, name in _aliases(model)}}


def _aliases(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the further names of shared parameters and buffers, each with the first one."""
    for named in (model.named_parameters, model.named_buffers):
        first = {id(tensor): name for name, tensor in named()}
        for name, tensor in named(remove_duplicate=False):
            if first[id(tensor)] != name:
                yield name, first[id(tensor)]
