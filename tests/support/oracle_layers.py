"""Layers that several networks of the oracle share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["FEATURES", "Apply", "Residual", "flat", "tanh_mlp", "with_statistics"]

FEATURES = 5
"""Features of a sample that is a vector."""


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """A layer and the identity."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def flat(width: int, activation: nn.Module, second: int | None = None) -> list[nn.Module]:
    """One hidden layer on vectors, or two."""
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), activation]
    return layers if second is None else [*layers, nn.Linear(width, second), activation]


def tanh_mlp(outputs: int) -> nn.Module:
    return nn.Sequential(*flat(10, nn.Tanh(), 6), nn.Linear(6, outputs))


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """The model after a few batches have gone into its running statistics."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(x + torch.randn_like(x))
    return model
