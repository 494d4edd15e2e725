"""Directions in the space of a model's parameters: random ones, and their filter normalisation (Li et al. 2018).

A direction is a flat vector (P,) over the parameters that require a gradient, in the order of
``model.named_parameters()``: the order of the eigenvectors that `sharpness` gives.
"""

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.parameters import trainable_parameters

__all__ = ["filter_normalized", "random_direction", "split_direction"]


def split_direction(model: nn.Module, direction: Tensor, name: str = "direction") -> dict[str, Tensor]:
    """The parts of a flat direction, each with the shape, data type and device of its parameter.

    Args:
        model: The model.
        direction: Flat vector, (P,).
        name: What the messages call it.

    Returns:
        Part of each parameter, by the parameter's name.

    Raises:
        ValueError: If the direction has another shape or is not finite.
    """
    named = trainable_parameters(model)
    sizes = [p.numel() for p in named.values()]
    if direction.shape != (sum(sizes),):
        raise ValueError(
            f"{name}: expected shape ({sum(sizes)},), one entry for each trainable parameter; "
            f"got {tuple(direction.shape)}"
        )
    if not bool(direction.isfinite().all()):
        raise ValueError(f"{name}: expected finite entries; got {int((~direction.isfinite()).sum())} nan or inf")
    parts = torch.split(direction.detach(), sizes)
    return {key: part.to(p.device, p.dtype).view(p.shape) for (key, p), part in zip(named.items(), parts, strict=True)}


def random_direction(model: nn.Module, seed: int = 0) -> Tensor:
    """Independent standard normal numbers, (P,), on the CPU, so that every device sees the same direction.

    Args:
        model: The model; its first trainable parameter gives the data type.
        seed: Seed; equal seeds give equal directions. The global generator is not touched.

    Raises:
        ValueError: If the model has no trainable parameter.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.landscape.directions import random_direction
        >>> random_direction(torch.nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    named = trainable_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(sum(p.numel() for p in named.values()), dtype=torch.float64, generator=generator)
    return numbers.to(next(iter(named.values())).dtype)


def filter_normalized(model: nn.Module, direction: Tensor) -> Tensor:
    r"""The direction with every filter scaled to the norm of the model's own, :math:`d_f \|\theta_f\| / \|d_f\|`.

    Takes out the freedom to scale the weights of a ReLU network without changing its function, which would make
    surfaces of different models incomparable. A filter f is what feeds one output unit: a row of a matrix, a channel of
    a convolution. Biases and the parameters of norm layers get zero, as in the paper.

    The first dimension of a weight counts its filters. A module whose weights stack several layers says how many
    leading dimensions do by an integer attribute ``num_filter_dims``: 2 for experts and their units. A parameter with
    no dimension beyond these is a bias.

    Args:
        model: The model :math:`\theta`; not changed.
        direction: d, flat, (P,).

    Returns:
        Flat direction, (P,), on the device and of the data type of ``direction``. A filter that is zero in the model
        or in the direction is zero.

    Raises:
        ValueError: If the direction has another shape or is not finite, or the model has no trainable parameter.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018, arXiv 1712.09913.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.landscape.directions import filter_normalized
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> filter_normalized(model, torch.tensor([1.0, -1.0, 5.0]))  # weight, weight, bias
        tensor([ 3., -3.,  0.])
    """
    named = trainable_parameters(model)
    parts = split_direction(model, direction)
    normalized = [_normalized(p.detach(), parts[name], _num_filter_dims(model, name)) for name, p in named.items()]
    return torch.cat([part.reshape(-1).to(direction.device, direction.dtype) for part in normalized])


def _num_filter_dims(model: nn.Module, parameter_name: str) -> int:
    owner = model.get_submodule(parameter_name.rpartition(".")[0])
    return int(getattr(owner, "num_filter_dims", 1))


def _normalized(parameter: Tensor, part: Tensor, num_filter_dims: int) -> Tensor:
    if parameter.dim() <= num_filter_dims:
        return torch.zeros_like(part)
    within = tuple(range(num_filter_dims, parameter.dim()))
    wanted = torch.linalg.vector_norm(parameter, dim=within, keepdim=True)
    length = torch.linalg.vector_norm(part, dim=within, keepdim=True)
    return torch.where(length > 0, part * (wanted / length), 0)
