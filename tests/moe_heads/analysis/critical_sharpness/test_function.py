"""Critical sharpness, against its closed form on quadratic losses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import critical_sharpness, update_of
from moe_heads.analysis.critical_sharpness.function import check_search
from moe_heads.analysis.critical_sharpness.line import critical_sharpness_along
from tests.support.lightning_models import assert_same, snapshot


class Quadratic(nn.Module):
    """The loss 0.5 (w - c)ᵀ H (w - c), with a random positive H."""

    def __init__(self, size: int = 12, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.hessian = (root @ root.T / size).to(dtype)
        self.weight = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, batch: Tensor) -> Tensor:
        return 0.5 * self.weight @ self.hessian @ self.weight * batch.mean()


BATCHES = [torch.ones(4, 1, dtype=torch.float64)]


def loss_fn(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def trained(kind: Any, steps: int = 7, **options: Any) -> tuple[Quadratic, torch.optim.Optimizer]:
    model = Quadratic()
    optimizer = kind(model.parameters(), **options)
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss_fn(model, BATCHES[0]).backward()
        if step < steps:
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.05}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 0.02}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_closed_form_on_a_quadratic(kind: Any, options: dict[str, Any]) -> None:
    model, optimizer = trained(kind, steps=3, **options)
    update = update_of(optimizer, model)
    found = critical_sharpness(model, loss_fn, BATCHES, update, learning_rate=options["lr"])
    step, gradient = update["weight"], model.hessian @ model.weight.detach()
    exact = float(step @ model.hessian @ step / -(gradient @ step)) / options["lr"]
    assert exact > 0
    assert abs(found.lambda_c / exact - 1) <= found.relative_error * (1 + 1e-9) <= 0.026
    assert found.lower <= exact <= found.upper
    assert found.converged and not found.reason and found.num_passes <= 8
    # on a quadratic, the loss changes by t gᵀd + t² dᵀHd / 2
    change = 0.5 * found.critical_step**2 * step @ model.hessian @ step + found.critical_step * gradient @ step
    assert abs(float(change)) <= 0.1 * abs(float(gradient @ step)) * found.critical_step


def test_a_warm_start_on_a_quadratic_takes_five_passes() -> None:
    model, optimizer = trained(torch.optim.SGD, lr=0.05)
    update = update_of(optimizer, model)
    first = critical_sharpness(model, loss_fn, BATCHES, update)
    again = critical_sharpness(model, loss_fn, BATCHES, update, start=first.critical_step)
    assert again.num_passes <= 5 and again.critical_step == pytest.approx(first.critical_step, rel=0.05)


def test_an_ascent_direction_is_unknown_with_a_bound() -> None:
    model, optimizer = trained(torch.optim.SGD, lr=0.05)
    update = {name: -step for name, step in update_of(optimizer, model).items()}
    found = critical_sharpness(model, loss_fn, BATCHES, update, learning_rate=0.05)
    assert math.isnan(found.lambda_c) and "no descent direction" in found.reason and not found.converged
    assert found.upper == math.inf and found.lower == pytest.approx(2 / (1e-3 * 0.05))
    assert "lambda_c" not in found.metrics() and "no descent direction" in found.summary()


def test_a_loss_without_a_rise_has_an_upper_bound() -> None:
    model = nn.Linear(1, 1, bias=False)
    update = {"weight": -torch.ones(1, 1)}
    found = critical_sharpness(model, lambda m, x: m(x).mean(), [torch.ones(2, 1)], update, largest_step=64.0)
    assert math.isnan(found.lambda_c) and "does not rise up to 64" in found.reason
    assert (found.lower, found.upper) == (0.0, pytest.approx(2 / 64))


def test_a_step_that_diverged() -> None:
    model = nn.Linear(2, 1)
    update = {name: torch.full_like(p, math.nan) for name, p in model.named_parameters()}
    found = critical_sharpness_along(
        lambda step: math.nan if step else 1.0, learning_rate=0.1, num_samples=1, resolution=lambda: 1e-7
    )
    assert found.reason == "the loss along the update is not finite: the step has diverged"
    with pytest.raises(ValueError, match="diverged"):
        critical_sharpness(model, lambda m, b: m(b).mean(), [torch.ones(3, 2)], update, learning_rate=0.1)


def test_an_update_of_zero_and_one_below_rounding_are_unknown() -> None:
    model = Quadratic(dtype=torch.float32)
    zero = critical_sharpness(model, loss_fn, [torch.ones(1, 1)], {"weight": torch.zeros(12)})
    assert math.isnan(zero.lambda_c) and "does not change" in zero.reason
    gradient = model.hessian @ model.weight.detach()
    tiny = {"weight": -1e-9 * gradient}
    found = critical_sharpness(model, loss_fn, [torch.ones(1, 1)], tiny, largest_step=10.0)
    assert math.isnan(found.lambda_c) and found.reason


def test_the_error_covers_rounding_near_a_minimum() -> None:
    model = Quadratic(dtype=torch.float32)
    with torch.no_grad():
        model.weight.mul_(1e-3)
    model.register_buffer("offset", torch.tensor(1.0))
    gradient = model.hessian @ model.weight.detach()

    def shifted(model: Any, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch) + model.offset
        return loss

    found = critical_sharpness(model, shifted, [torch.ones(1, 1)], {"weight": -0.1 * gradient})
    exact = 0.1 * float(gradient @ model.hessian @ gradient / gradient.square().sum())
    assert found.reason or abs(found.lambda_c / exact - 1) <= found.relative_error


def test_the_model_and_the_generators_are_restored_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).train()
    model(torch.randn(5, 3)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = update_of(optimizer, model)
    data = [torch.randn(5, 3)]
    before = snapshot(model)
    critical_sharpness(model, lambda m, x: m(x).square().mean(), data, update)
    assert_same(before, snapshot(model))
    calls = 0

    def failing(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("lost")
        return model(batch).square().mean()

    with pytest.raises(KeyError):
        critical_sharpness(model, failing, data, update)
    assert_same(before, snapshot(model))


def test_a_weighted_mean_over_batches() -> None:
    model, optimizer = trained(torch.optim.SGD, lr=0.05)
    update = update_of(optimizer, model)
    whole = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)[:, None]
    one = critical_sharpness(model, loss_fn, [whole], update)
    parts = critical_sharpness(model, loss_fn, [whole[:4], whole[4:]], update)
    assert parts.lambda_c == pytest.approx(one.lambda_c) and parts.loss == pytest.approx(one.loss)
    assert parts.num_samples == 6


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({}, "expected a tensor by name"),
        ({"bias": torch.zeros(12)}, "such as 'weight', got 'bias'"),
        ({"weight": torch.zeros(3)}, r"the shape \(12,\) for 'weight', got \(3,\)"),
        ({"weight": torch.full((12,), math.nan)}, "expected finite values"),
    ],
)
def test_wrong_updates(update: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        critical_sharpness(Quadratic(), loss_fn, BATCHES, update)


def test_wrong_options() -> None:
    for options in ({"tolerance": 0.0}, {"max_passes": 3}, {"smallest_step": 2.0, "largest_step": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            check_search(**{"tolerance": 0.1, "max_passes": 5, "smallest_step": 0.1, "largest_step": 9.0, **options})
    with pytest.raises(ValueError, match="expected a finite loss before the update"):
        critical_sharpness(Quadratic(), lambda m, x: m(x) * math.nan, BATCHES, {"weight": torch.ones(12)})


def test_half_precision_measures_its_rounding() -> None:
    model = Quadratic(dtype=torch.bfloat16)
    gradient = model.hessian @ model.weight.detach()
    batches = [torch.ones(2, 1)]
    found = critical_sharpness(model, lambda m, x: m(x.bfloat16()).float(), batches, {"weight": -0.3 * gradient})
    exact = 0.3 * float(gradient @ model.hessian @ gradient / gradient.square().sum())
    assert found.reason or abs(found.lambda_c / exact - 1) <= max(found.relative_error, 0.1)
    assert found.num_passes > len(found.losses) + 1 or found.reason


def test_plot_marks_the_rise() -> None:
    model, optimizer = trained(torch.optim.SGD, lr=0.05)
    found = critical_sharpness(model, loss_fn, BATCHES, update_of(optimizer, model))
    _, ax = found.plot()
    assert "critical sharpness" in ax.get_title() and len(ax.lines) == 4
