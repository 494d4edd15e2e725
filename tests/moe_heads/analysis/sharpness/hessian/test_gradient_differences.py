"""Central differences of gradients against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.gradient_differences import (
    GradientAt,
    GradientDifferences,
    ShiftedGradient,
    StepsDisagreeError,
)

THETA = torch.tensor([1.0, 2.0, -0.5]).double()
V = torch.tensor([1.0, -1.0, 3.0]).double()


def along(v: Tensor, loss: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]) -> GradientAt:
    def at(t: float) -> ShiftedGradient:
        theta = THETA + t * v
        found = gradient(theta)
        return ShiftedGradient(found, (v * found).sum()[None], float(loss(theta)))

    return at


def differences(tolerance: float = 1e-6) -> GradientDifferences:
    return GradientDifferences(float(THETA.norm()), torch.float64, tolerance, 3)


def exponential(v: Tensor) -> GradientAt:
    return along(v, lambda theta: theta.exp().sum(), torch.exp)


def test_equals_the_second_derivative_in_closed_form() -> None:
    found = differences()
    product = found.product(exponential(V), float(V.norm()))
    exact = THETA.exp() * V
    error = float((product.gradient - exact).norm())
    assert error < 1e-9 * float(exact.norm())
    assert float(product.forms) == pytest.approx(float(V @ exact), rel=1e-9)
    assert product.loss == pytest.approx(float(THETA.exp().sum()), rel=1e-8)
    assert found.last is not None
    assert error <= 2 * found.last.difference < 1e-6
    assert found.derivative_error < 1e-6
    assert found.scale == pytest.approx(float(exact.norm() / V.norm()), rel=1e-8)


def test_a_kink_is_refused_with_the_size_of_the_difference() -> None:
    # the gradient of |theta - 1| jumps by 2 at theta: differences with the steps h and h/2 are 1/h and 2/h
    jump = along(V, lambda theta: (theta - THETA).abs().sum(), lambda theta: (theta - THETA).sign())
    with pytest.raises(StepsDisagreeError, match=r"products that differ by 43 % between the steps .*kinks"):
        differences().product(jump, float(V.norm()))


def test_a_shorter_step_is_taken_where_the_first_one_is_too_long() -> None:
    # the last step alone resolves this wave
    wave = 1e6
    quick = along(V, lambda theta: -(wave * theta).cos().sum() / wave**2, lambda theta: (wave * theta).sin() / wave)
    found = differences(tolerance=1e-3)
    product = found.product(quick, float(V.norm())).gradient
    exact = (wave * THETA).cos() * V
    assert found.last is not None
    assert 0 < float((product - exact).norm()) <= 2 * found.last.difference < 1e-3 * float(exact.norm())


def test_an_imprecise_gradient_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = along(
        V,
        lambda theta: theta.exp().sum(),
        lambda theta: theta.exp() + 1e-3 * torch.randn(3, generator=generator).double(),
    )
    with pytest.raises(StepsDisagreeError):
        differences().product(noise, float(V.norm()))


def test_a_gradient_of_another_loss_shows_in_the_derivative_error() -> None:
    found = differences()
    doubled = along(V, lambda theta: theta.exp().sum(), lambda theta: 2 * theta.exp())
    found.product(doubled, float(V.norm()))
    assert found.derivative_error > 0.05


def test_nan_is_refused_and_a_zero_vector_gives_zero() -> None:
    broken = along(V, lambda theta: theta.sum(), lambda theta: theta * math.nan)
    with pytest.raises(StepsDisagreeError):
        differences().product(broken, 1.0)
    assert not differences().product(exponential(0 * V), 0.0).gradient.any()


def test_processes_with_parts_agree_with_one() -> None:
    """Two processes in a row: the first records its sums, the second adds them."""
    parts = [slice(0, 2), slice(2, 3)]
    sums: list[Tensor] = []
    for part in parts:
        recorded: list[Tensor] = []

        def keep(values: Tensor, recorded: list[Tensor] = recorded) -> Tensor:
            recorded.append(values.clone())
            return values

        def at(t: float, part: slice = part) -> ShiftedGradient:
            whole = exponential(V)(t)
            mine = whole.gradient[part]
            return ShiftedGradient(mine, (V[part] * mine).sum()[None], whole.loss / 2)

        GradientDifferences(float(THETA.norm()), torch.float64, 1.0, 3, keep).product(at, float(V.norm()))
        sums.append(recorded[0])
    alone: list[Tensor] = []
    GradientDifferences(
        float(THETA.norm()), torch.float64, 1.0, 3, lambda values: alone.append(values.clone()) or values
    ).product(exponential(V), float(V.norm()))
    torch.testing.assert_close(sums[0] + sums[1], alone[0])
