"""The update of every torch optimizer by a dry step: equal to the real step, with everything put back."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_heads.analysis.critical_sharpness.update import (
    check_has_update,
    learning_rate_of,
    made_update,
    parameter_values,
    update_of,
)

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "momentum foreach": ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "momentum fused": ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "AdamW foreach": ("AdamW", {"lr": 0.01, "foreach": True}),
    "AdamW fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": ("Adagrad", {"lr": 0.01}),
    "Adadelta": ("Adadelta", {"lr": 1.0}),
    "Adafactor": ("Adafactor", {"lr": 0.01}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "NAdam": ("NAdam", {"lr": 0.01}),
    "RAdam": ("RAdam", {"lr": 0.01}),
    "Rprop": ("Rprop", {"lr": 0.01}),
    "ASGD": ("ASGD", {"lr": 0.01}),
    "Muon": ("Muon", {"lr": 0.01}),
}


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    biases = kind != "Muon"  # which takes matrices only
    return nn.Sequential(nn.Linear(4, 5, bias=biases), nn.Tanh(), nn.Linear(5, 3, bias=biases))


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    state = copy.deepcopy(optimizer.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [{n: p.detach().clone() for n, p in model.named_parameters()}, gradients, state, torch.get_rng_state()]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_equals_the_step_that_follows_and_changes_nothing(name: str, steps: int) -> None:
    kind, options = OPTIMIZERS[name]
    model = network(kind)
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
    backward(model, 9)
    before, gradients = contents(model, optimizer), [p.grad for p in model.parameters()]
    states = {id(p): id(found) for p, found in optimizer.state.items()}
    update = update_of(optimizer, model)
    assert_equal(before, contents(model, optimizer))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert states == {id(p): id(found) for p, found in optimizer.state.items()}
    held = parameter_values(optimizer, model)
    optimizer.step()
    made = made_update(model, held)
    assert_equal(update, made)
    assert all(bool(step.any()) for step in made.values())


def test_step_hooks_and_schedules_do_not_notice() -> None:
    model = network("SGD")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, 0)
    update_of(optimizer, model)
    assert calls == []
    optimizer.step()
    schedule.step()
    assert calls == ["pre", "post"] and optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_an_error_in_the_step_restores_everything() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["lr"] = 7.0
            raise RuntimeError("failed")

    model = network("SGD")
    optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, 0)
    before = contents(model, optimizer)
    with pytest.raises(RuntimeError, match="failed"):
        update_of(optimizer, model)
    assert_equal(before, contents(model, optimizer))


def test_an_optimizer_that_overwrites_gradients_and_draws_random_numbers() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad.add_(torch.randn_like(p))
            return super().step(closure)

    model = network("SGD")
    optimizer = Noisy(model.parameters(), lr=0.1)
    backward(model, 0)
    before = contents(model, optimizer)
    one, other = update_of(optimizer, model), update_of(optimizer, model)
    assert_equal(before, contents(model, optimizer))
    assert_equal(one, other)


def test_lbfgs_and_missing_gradients_are_errors() -> None:
    model = network("SGD")
    with pytest.raises(ValueError, match="an update direction, got LBFGS, whose step needs the argument 'closure'"):
        check_has_update(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="expected parameters with a gradient, got none"):
        update_of(torch.optim.SGD(model.parameters()), model)
    with pytest.raises(ValueError, match=r"expected a torch\.optim\.Optimizer"):
        check_has_update(3)
    with pytest.raises(ValueError, match="one that is no part of it"):
        update_of(torch.optim.SGD(network("SGD").parameters()), model)


def test_parameters_without_a_gradient_are_left_out() -> None:
    model = network("SGD")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    model[0].weight.grad = None
    assert set(update_of(optimizer, model)) == {"0.bias", "2.weight", "2.bias"}


def test_the_learning_rate_of_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.2)]
    assert learning_rate_of(torch.optim.SGD(groups)) is None
    assert learning_rate_of(torch.optim.SGD(groups[:1])) == 0.1
    assert learning_rate_of(torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))) == 0.5
    assert learning_rate_of(torch.optim.SGD(groups[:1], lr=0.0)) == 0.1
