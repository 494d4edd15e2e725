"""The check in float64 in the memory of a few vectors agrees with the check that differentiates twice in float64."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import SharpnessResult, sharpness
from moe_heads.analysis.sharpness import function
from moe_heads.analysis.sharpness.hessian import double_check
from tests.support.hessians import Batch, cross_entropy


class _TooSteep(torch.autograd.Function):
    """tanh whose gradient is too large by a factor, and is differentiated correctly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return slopes[0] * (1 - y * y) * 1.05


class _WrongCurvature(torch.autograd.Function):
    """x² / 2 whose second derivative lacks a tenth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slopes[0] * (0.9 * x + 0.1 * x.detach())


def problem() -> tuple[nn.Sequential, list[Batch]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 6))
    return model, [(torch.randn(4, 5), torch.randint(6, (4,))) for _ in range(2)]


def lean(monkeypatch: pytest.MonkeyPatch, loss: Any, model: nn.Module, batches: Any, **options: Any) -> SharpnessResult:
    monkeypatch.setattr(double_check, "LEAN_ABOVE", 0)
    monkeypatch.setattr(function, "LEAN_ABOVE", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sharpness(model, loss, batches, density=False, **options)


@pytest.mark.parametrize("trace", [True, False])
def test_equals_the_check_with_a_float64_graph(monkeypatch: pytest.MonkeyPatch, trace: bool) -> None:
    model, batches = problem()
    expected = sharpness(model, cross_entropy, batches, density=False, trace=trace)
    found = lean(monkeypatch, cross_entropy, model, batches, trace=trace)
    assert found.eigenvalues == expected.eigenvalues and found.eigenvalues_converged
    assert found.trace_converged == expected.trace_converged
    certificate, other = found.certificate, expected.certificate
    # rounding of float32, measured on four samples in place of all
    assert certificate.num_double == 4 and not certificate.unchecked
    assert 0 < certificate.rounding < 20 * other.rounding and certificate.rounding > other.rounding / 20
    assert certificate.curvature_error < 1e-5 and certificate.derivative_error == 0 and certificate.repeat_error == 0
    assert math.isnan(certificate.trace_rounding) == (not trace)
    for block in found.blocks:
        assert found.blocks[block].shares == pytest.approx(expected.blocks[block].shares)


def test_finds_a_gradient_that_is_not_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = problem()

    def loss(m: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(m[2](_TooSteep.apply(m[0](batch[0]))), batch[1])

    found = lean(monkeypatch, loss, model, batches, trace=False)
    assert not found.eigenvalues_converged and not found.certificate.is_derivative


def test_finds_a_product_that_is_not_the_derivative_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = problem()

    def loss(m: Any, batch: Batch) -> Tensor:
        out: Tensor = _WrongCurvature.apply(m(batch[0]))
        return out.mean()

    found = lean(monkeypatch, loss, model, batches, trace=False)
    assert not found.eigenvalues_converged
    assert found.certificate.curvature_error > 1e-2 or found.certificate.asymmetry > 1e-3


def test_a_loss_that_holds_the_parameters_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = problem()
    weight = model[0].weight

    def loss(m: Any, batch: Batch) -> Tensor:
        return cross_entropy(m, batch) + 0.1 * weight.square().sum()

    found = lean(monkeypatch, loss, model, batches, trace=False)
    assert "parameters other than through the modules" in found.certificate.unchecked["products in float64"]


def test_kinks_take_the_smaller_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 6))
    _, batches = problem()
    found = lean(monkeypatch, cross_entropy, model, batches, trace=False)
    assert found.eigenvalues_converged and found.certificate.curvature_error < 1e-2
