"""The trainable parameters and their order."""

import pytest
from torch import nn

from moe_heads.analysis._shared.parameters import trainable_parameters


def test_frozen_ones_are_left_out_and_shared_ones_come_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert list(trainable_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


def test_a_model_without_trainable_parameters_raises_an_error() -> None:
    with pytest.raises(ValueError, match="model: expected at least one parameter that requires a gradient, got none"):
        trainable_parameters(nn.Flatten())


def test_lazy_parameters_raise_an_error() -> None:
    with pytest.raises(ValueError, match="model: expected initialized parameters, got a lazy 'weight'"):
        trainable_parameters(nn.LazyLinear(2))
