"""Layers without a second derivative: the results are those of the same function in plain form, and say how."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import SharpnessResult, sharpness
from moe_heads.analysis.sharpness.hessian import HessianOperator, directional_curvatures, top_eigenvector
from moe_heads.analysis.sharpness.hessian.gradient_differences import StepsDisagreeError
from tests.support.no_second_derivative import OnceDifferentiableSine, RoughGradient, SilentSine, StraightThrough


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(function: Callable[[Tensor], Tensor], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 6), Of(function), nn.Linear(6, 3))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def data(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=generator).to(dtype), torch.randint(3, (30,), generator=generator)
    return [(x[:18], y[:18]), (x[18:], y[18:])]


def analyzed(model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> SharpnessResult:
    return sharpness(model, loss_fn, data(dtype), **{"num_eigenvalues": 2, "max_probes": 8, "density": False} | options)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_that_is_once_differentiable_gives_the_result_of_its_plain_form(
    activation: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = net(OnceDifferentiableSine.apply, activation).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    found, exact = analyzed(model, dtype), analyzed(net(torch.sin, activation).to(dtype), dtype)
    assert found.eigenvalues == pytest.approx(exact.eigenvalues, rel=1e-6)
    assert (found.lambda_min, found.trace) == pytest.approx((exact.lambda_min, exact.trace), rel=1e-4)
    assert found.eigenvalues_converged and found.certificate is not None
    assert 0 <= found.certificate.step_error < 1e-5
    summary = found.summary()
    kind = "" if dtype == torch.float64 else " in float64"
    assert f"finite differences of gradients{kind} and no exact derivatives (3 (Of): a layer" in summary
    assert "| product with half the step |" in summary and "no exact derivatives |" in summary
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_part_of_the_parameters() -> None:
    model, exact = net(OnceDifferentiableSine.apply), net(torch.sin)
    for names in (["0"], ["4"], ["2.weight"]):
        found, expected = analyzed(model, params=names), analyzed(exact, params=names)
        assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-5)
        assert found.parameter_names == expected.parameter_names


def test_directions_and_eigenvectors_use_differences_too() -> None:
    model, exact = net(OnceDifferentiableSine.apply), net(torch.sin)
    direction = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()))
    (found,) = directional_curvatures(model, loss_fn, data(), [direction])
    (expected,) = directional_curvatures(exact, loss_fn, data(), [direction])
    assert found == pytest.approx(expected, rel=1e-5)
    overlap = top_eigenvector(model, loss_fn, data()) @ top_eigenvector(exact, loss_fn, data())
    assert abs(float(overlap)) == pytest.approx(1, abs=1e-5)


def test_a_connectionist_loss_has_the_curvature_of_the_log_of_a_sum() -> None:
    """One label in two frames: the paths are (y, y), (y, blank) and (blank, y)."""

    def plain(model: nn.Module, x: Tensor) -> Tensor:
        logs = model(x).log_softmax(-1)  # (2, N, C)
        label, blank = logs[..., 1], logs[..., 0]
        paths = [label[0] + label[1], label[0] + blank[1], blank[0] + label[1]]
        return -torch.stack(paths).logsumexp(0).mean()

    def fused(model: nn.Module, x: Tensor) -> Tensor:
        count = x.shape[1]
        sizes = torch.full((count,), 2), torch.ones(count, dtype=torch.long)
        return F.ctc_loss(model(x).log_softmax(-1), torch.ones(count, 1, dtype=torch.long), *sizes)

    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(2, 9, 3)
    # torch's mean divides by the length of the labels, 1
    found, exact = (sharpness(model, loss, [x], num_eigenvalues=3) for loss in (fused, plain))
    assert found.eigenvalues == pytest.approx(exact.eigenvalues, rel=1e-5)
    assert found.trace == pytest.approx(exact.trace, rel=1e-5)
    assert found.converged and "ctc_loss" in found.graph_reason


def test_a_gradient_that_jumps_is_left_out_with_the_difference_and_the_layer() -> None:
    message = r"products that differ by .* % between the steps .* and .* \(tolerance 0.1 %\).*3 \(Of\): a layer .*plain"
    with pytest.raises(StepsDisagreeError, match=message):
        analyzed(net(RoughGradient.apply))


def test_a_gradient_of_another_function_is_not_certified() -> None:
    with pytest.warns(UserWarning, match="The (gradient is not|products are not)"):
        found = analyzed(net(StraightThrough.apply))
    assert not found.eigenvalues_converged and not found.trace_converged
    assert found.certificate is not None and not found.certificate.is_derivative


@pytest.mark.parametrize("only_float32", [False, True])
def test_a_silent_zero_does_not_pass(only_float32: bool) -> None:
    def function(x: Tensor) -> Tensor:
        if only_float32 and x.dtype != torch.float32:
            raise TypeError("expected float32")
        return SilentSine.apply(3 * x)

    with pytest.warns(UserWarning, match="The products are not"):
        found = analyzed(net(function))
    assert not found.converged and not found.eigenvalues_converged
    assert found.certificate is not None and not found.certificate.is_hessian


def test_a_function_that_runs_in_float32_only_is_moved_in_place() -> None:
    def function(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return OnceDifferentiableSine.apply(x)

    model, exact = net(function), net(torch.sin)
    before = [p.detach().clone() for p in model.parameters()]
    found, expected = analyzed(model, tolerance=3e-3), analyzed(exact)
    assert "in float64" not in found.graph_reason
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-3)
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))


def test_attention_whose_kernel_the_model_chooses() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                tokens = x.view(-1, 1, 3, 2)
                return F.scaled_dot_product_attention(tokens, tokens, tokens).view(-1, 6)

        return function

    found = analyzed(net(attention(SDPBackend.FLASH_ATTENTION)))
    expected = analyzed(net(attention(SDPBackend.MATH)))
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-5)
    assert "flash" in found.graph_reason


def test_the_operator_of_exact_products_keeps_its_error() -> None:
    model = net(OnceDifferentiableSine.apply)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        HessianOperator(model, loss_fn, data()).check_second_derivative()
