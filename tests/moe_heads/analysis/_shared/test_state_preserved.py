"""Whatever a block does to the model and the generators is undone."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from moe_heads.analysis import analysis_mode, preserved


class Everything(nn.Module):
    """One of each kind of state that can be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.values = torchmetrics.CatMetric()
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def model() -> Everything:
    built = Everything()
    built(torch.randn(6, 3)).sum().backward()
    built.accuracy.update(torch.randn(5, 3), torch.randint(3, (5,)))
    built.values.update(torch.randn(4))
    built.layers[0].eval()
    return built


def state(built: Everything) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in [*built.named_parameters(), *built.named_buffers()]},
        "identity": [id(t) for t in [*built.parameters(), *built.buffers()]],
        "grads": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in built.named_parameters()
        },
        "requires_grad": [p.requires_grad for p in built.parameters()],
        "training": [module.training for module in built.modules()],
        "accuracy": built.accuracy.compute().clone(),
        "values": built.values.compute().clone(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
    }


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, tuple):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def wreck(built: Everything) -> None:
    """Change all of it."""
    built.train()
    with torch.no_grad():
        for tensor in [*built.parameters(), *built.buffers()]:
            tensor.add_(1)
    built.scratch = torch.full((7,), 9.0)
    built.layers[0].weight = nn.Parameter(torch.zeros(4, 3))
    for parameter in built.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    built.accuracy.update(torch.randn(5, 3), torch.randint(3, (5,)))
    built.values.update(torch.randn(4))
    random.random()
    np.random.rand()
    torch.rand(1)


def replace_grads(built: Everything) -> None:
    for parameter in built.parameters():
        parameter.grad = None


def accumulate_grads(built: Everything) -> None:
    built.train()(torch.randn(6, 3)).sum().backward()


@pytest.mark.parametrize("harm", [wreck, replace_grads, accumulate_grads, Everything.zero_grad])
def test_everything_is_put_back(harm: Callable[[Everything], None]) -> None:
    built = model()
    before = state(built)
    with preserved(built):
        harm(built)
    assert_equal(before, state(built))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_error(error: type[BaseException]) -> None:
    built = model()
    before = state(built)
    with pytest.raises(error), preserved(built):
        wreck(built)
        raise error
    assert_equal(before, state(built))


def test_nan_weights_stay_nan() -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, float("nan"))
    with preserved(layer):
        nn.init.zeros_(layer.weight)
    assert layer.weight.isnan().all()


def test_lazy_parameters_pass() -> None:
    lazy = nn.LazyLinear(2)
    with preserved(lazy):
        pass
    assert lazy.has_uninitialized_params()


def test_gradients_are_put_aside_and_not_copied() -> None:
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    gradient = layer.weight.grad
    with preserved(layer):
        assert layer.weight.grad is None
        layer(torch.ones(1, 3)).square().sum().backward()
        assert layer.weight.grad is not gradient
    assert layer.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(2, 3))


def test_analysis_mode_is_deterministic_evaluation_with_gradients() -> None:
    built = model()
    samples = []
    with torch.no_grad():
        for _ in range(2):
            with analysis_mode(built, seed=3), torch.autocast("cpu", enabled=False):
                assert torch.is_grad_enabled()
                assert not any(module.training for module in built.modules())
                samples.append((torch.rand(1), random.random(), np.random.rand()))
    assert_equal(samples[0], samples[1])


def test_analysis_mode_turns_autocast_off() -> None:
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 2)).dtype == torch.bfloat16
        with analysis_mode(layer):
            assert layer(torch.randn(1, 2)).dtype == torch.float32


def test_analysis_mode_gives_attention_a_second_derivative() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    with analysis_mode(attention):
        loss = attention(x, x, x, need_weights=False)[0].square().sum()
        (gradient,) = torch.autograd.grad(loss, [attention.in_proj_weight], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), [attention.in_proj_weight])
    assert second.abs().sum() > 0


def test_attributes_of_a_parameter_are_put_back_and_new_ones_go() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.mine = kept = [1]
    with preserved(layer):
        layer.weight.mine = 2
        layer.bias._mark = 1
    assert vars(layer.weight) == {"mine": kept}
    assert layer.weight.mine is kept
    assert vars(layer.bias) == {}


def test_a_block_inside_another_shares_what_is_still_the_same() -> None:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.bias.zero_()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with preserved(layer) as outer:
        layer.bias.data.neg_()  # equal numbers, other bits
        with preserved(layer) as inner:
            assert inner(layer.weight) is outer(layer.weight)
            assert inner(layer.bias) is not outer(layer.bias)
            layer.weight.data.fill_(5)
            layer.bias.data.fill_(5)
        assert torch.equal(layer.weight, before["weight"])
        assert torch.signbit(layer.bias).all()
        layer.weight.data.fill_(6)
    assert torch.equal(layer.weight, before["weight"])
    assert not torch.signbit(layer.bias).any()
