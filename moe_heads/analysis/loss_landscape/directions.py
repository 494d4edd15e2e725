"""Directions in the parameter space of a model: random ones, their normalization (Li et al. 2018), other weights.

A direction is a flat vector (P,) over the parameters that require a gradient, or a selection of them, in the order of
``model.named_parameters()``. This is the order of the eigenvectors of `sharpness`. Or it is a state dict with the
weights and buffers at coordinate 1.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from moe_heads.analysis._shared.parameter_path import Steps, Target
from moe_heads.analysis._shared.parameters import Selection, trainable_parameters
from moe_heads.analysis._shared.shards import full, local, part_of
from moe_heads.checks import check_option, check_seed

__all__ = ["Biases", "Direction", "filter_normalized", "layer_normalized", "random_direction", "steps_of"]

Direction = Tensor | Mapping[str, Tensor]
"""A flat vector, or a state dict that is reached at coordinate 1."""

Biases = Literal["zero", "normalized"]
"""Treatment of biases and of the parameters of norm layers."""

# The parameters of these may have several dimensions. In other classes a bias is recognized by its shape.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def steps_of(model: nn.Module, direction: Direction, name: str, params: Selection | None = None) -> Steps:
    """Return the steps of a `ParameterPath` along a direction.

    Raises:
        ValueError: If it does not fit the model.
    """
    if isinstance(direction, Tensor):
        named = trainable_parameters(model, params)
        parts = split_direction(model, direction, name, params)
        return {key: part_of(named[key], part) for key, part in parts.items()}
    if not isinstance(direction, Mapping):
        raise ValueError(f"{name}: expected a flat tensor or a state dict, got {direction!r}.")
    return _targets(model, direction, name, params)


def split_direction(
    model: nn.Module, direction: Tensor, name: str = "direction", params: Selection | None = None
) -> dict[str, Tensor]:
    """Split a flat direction into parts with the shape, data type and device of the parameters.

    Args:
        model: The model.
        direction: Flat vector, (P,).
        name: Name of the argument in error messages.
        params: The parameters that it is over. By default all that require a gradient.

    Returns:
        The part of each parameter by the name of the parameter.

    Raises:
        ValueError: If the direction has another shape or is not finite.
    """
    if not isinstance(direction, Tensor):
        raise ValueError(f"{name}: expected a flat tensor, got {direction!r}.")
    named = trainable_parameters(model, params)
    sizes = [p.numel() for p in named.values()]
    if direction.shape != (sum(sizes),):
        raise ValueError(
            f"{name}: expected shape ({sum(sizes)},), one entry for each trainable parameter"
            f"{'' if params is None else ' of params'}, got {tuple(direction.shape)}. Pass a direction for this model."
        )
    # the sum is nan or inf if an entry is, and needs no memory
    if not bool(direction.sum().isfinite()) and not bool(direction.isfinite().all()):
        raise ValueError(f"{name}: expected finite entries, got {int((~direction.isfinite()).sum())} nan or inf.")
    parts = torch.split(direction.detach(), sizes)
    return {key: part.to(p.device, p.dtype).view(p.shape) for (key, p), part in zip(named.items(), parts, strict=True)}


def random_direction(model: nn.Module, seed: int = 0, params: Selection | None = None) -> Tensor:
    """Draw independent standard normal numbers, (P,), on the CPU, so that all devices get the same direction.

    Args:
        model: The model. Its first trainable parameter determines the data type.
        seed: Seed. Equal seeds and data types give equal directions. The global generator is not used.
        params: The parameters that it is over. By default all that require a gradient.

    Raises:
        ValueError: If the model has no trainable parameter.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import random_direction
        >>> random_direction(torch.nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    check_seed(seed)
    named = trainable_parameters(model, params)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(iter(named.values())).dtype
    # drawing in double precision takes three times as long; narrower types are rounded from single precision
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(sum(p.numel() for p in named.values()), dtype=drawn, generator=generator).to(dtype)


def filter_normalized(
    model: nn.Module, direction: Tensor, *, params: Selection | None = None, biases: Biases = "zero"
) -> Tensor:
    r"""Scale every filter of a direction to the norm of the model's filter, :math:`d_f \|\theta_f\| / \|d_f\|`.

    The weights of a ReLU network can be scaled without changing its function, which makes surfaces of different models
    incomparable. The normalization removes this freedom. A filter f has the weights of one output unit: a row of a
    matrix, or a channel of a convolution.

    The first dimension of a weight counts its filters. In a transposed convolution it is the second dimension, within
    each group. A module whose weights stack several layers declares the number of leading dimensions that count filters
    in an integer attribute ``num_filter_dims``: 2 for experts and their units. A parameter without further dimensions
    is a bias. So are all parameters of norm layers, which are recognized by their class or by an attribute
    ``normalized_shape``.

    Args:
        model: The model :math:`\theta`. It is not changed.
        direction: d, flat, (P,).
        params: The parameters that it is over. By default all that require a gradient.
        biases: "zero" as in the paper, so that biases do not move, or "normalized", so that each is scaled to its own
            norm as a whole (the biases of stacked experts together).

    Returns:
        Flat direction, (P,), with the device and data type of ``direction``. A filter that is zero in the model or in
        the direction is zero.

    Raises:
        ValueError: If the direction has another shape or is not finite, or the model has no trainable parameter.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018, arXiv 1712.09913.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import filter_normalized
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> filter_normalized(model, torch.tensor([1.0, -1.0, 5.0]))  # weight, weight, bias
        tensor([ 3., -3.,  0.])
    """
    return _normalized(model, direction, params, biases, by_filter=True)


def layer_normalized(
    model: nn.Module, direction: Tensor, *, params: Selection | None = None, biases: Biases = "zero"
) -> Tensor:
    r"""Scale every parameter of a direction to its norm in the model, :math:`d_p \|\theta_p\| / \|d_p\|`.

    This is coarser than `filter_normalized`. Arguments, zeros and errors are the same.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import layer_normalized
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> layer_normalized(model, torch.tensor([2.0, 0.0]))
        tensor([5., 0.])
    """
    return _normalized(model, direction, params, biases, by_filter=False)


def _normalized(
    model: nn.Module, direction: Tensor, params: Selection | None, biases: Biases, *, by_filter: bool
) -> Tensor:
    check_option("biases", biases, get_args(Biases))
    parts = split_direction(model, direction, params=params)
    scaled = []
    for name, parameter in trainable_parameters(model, params).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        parameter = nn.Parameter(full(parameter), requires_grad=False)
        if not _is_bias(owner, parameter):
            scaled.append(
                _scaled(owner, parameter.detach(), parts[name]) if by_filter else _resized(parameter, parts[name])
            )
        else:
            scaled.append(_resized(parameter, parts[name]) if biases == "normalized" else torch.zeros_like(parts[name]))
    return torch.cat([part.reshape(-1).to(direction.device, direction.dtype) for part in scaled])


def _num_filter_dims(owner: nn.Module) -> int:
    return int(getattr(owner, "num_filter_dims", 1))


def _is_bias(owner: nn.Module, parameter: Tensor) -> bool:
    is_norm = isinstance(owner, _NORMS) or hasattr(owner, "normalized_shape")
    return is_norm or parameter.dim() <= _num_filter_dims(owner)


def _scaled(owner: nn.Module, parameter: Tensor, part: Tensor) -> Tensor:
    """Scale each filter to its norm in the model."""
    if not isinstance(owner, _ConvTransposeNd):
        return _resized(parameter, part, _num_filter_dims(owner))
    # (in, out / groups, ...): an output channel has the inputs of its group
    weight, step = (t.unflatten(0, (owner.groups, -1)).transpose(1, 2) for t in (parameter, part))
    return _resized(weight, step, 2).transpose(1, 2).reshape(part.shape)


def _resized(parameter: Tensor, part: Tensor, num_filter_dims: int = 0) -> Tensor:
    """Scale a part to the norm of the parameter over all dimensions except the first ``num_filter_dims``."""
    within = tuple(range(num_filter_dims, parameter.dim()))
    target = torch.linalg.vector_norm(parameter.detach(), dim=within, keepdim=True)
    length = torch.linalg.vector_norm(part, dim=within, keepdim=True)
    return torch.where(length > 0, part * (target / length), 0)


def _targets(model: nn.Module, state: Mapping[str, Tensor], name: str, params: Selection | None) -> Steps:
    """Return targets for the parameters and floating-point buffers of a state dict, or for ``params`` if given."""
    parameters = trainable_parameters(model, params, only_real=False)
    here: dict[str, Tensor] = {**parameters}
    if params is None:
        here |= dict(model.named_parameters())
        here |= {key: buffer for key, buffer in model.named_buffers() if buffer.is_floating_point()}
    missing = [key for key in parameters if key not in state]
    if missing:
        raise ValueError(f"{name}: expected a state with all trainable parameters, got one without {missing[0]!r}.")
    steps: dict[str, Target] = {}
    for key, tensor in here.items():
        if key not in state:
            continue
        end = full(state[key])
        if end.shape != tensor.shape or not bool(end.isfinite().all()):
            got = f"shape {tuple(end.shape)}" if end.shape != tensor.shape else "nan or inf"
            raise ValueError(f"{name}: expected finite {key!r} of shape {tuple(tensor.shape)}, got {got}.")
        end = part_of(tensor, end).to(tensor.device, tensor.dtype)
        if not torch.equal(end, local(tensor.detach())):
            steps[key] = Target(end)
    return steps
