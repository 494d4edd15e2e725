"""Where the usual products with the Hessian of a loss are wrong, sharpness is right or says that it is not.

A result that claims to have converged, with no warning, has to be that of the loss itself: the mean over all samples as
one batch, differentiated numerically where torch's gradient is no derivative.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis.sharpness.function import sharpness
from moe_heads.analysis.sharpness.result import SharpnessResult
from tests.support.oracle_hessians import LossFn, hessian_of_batches
from tests.support.oracle_traps import NO_DERIVATIVES, NO_MEANS, UNSTEADY, mlp
from tests.support.untouched import untouched

SIZES = [7, 50, 3]


def data() -> tuple[Tensor, Tensor]:
    """Samples roughly in the order of their labels, as a loader without shuffling gives them."""
    x = torch.randn(sum(SIZES), 4, dtype=torch.float64)
    y = torch.randint(0, 3, (len(x),)).sort().values
    y[::3] = y[::3].flip(0)
    return x, y


def in_batches(whole: tuple[Tensor, Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(list(sizes)) for part in whole), strict=True))


def silent_result(model: nn.Module, loss_fn: LossFn, batches: list[Any], **options: Any) -> SharpnessResult | None:
    """The result, if it claims to be right; None if it warns, does not converge or raises an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with untouched(model):
                result = sharpness(model, loss_fn, batches, num_eigenvalues=3, density=False, **options)
        except (ValueError, RuntimeError):
            return None
    return result if result.eigenvalues_converged and not caught else None


def second_differences(
    model: nn.Module, loss_fn: LossFn, batch: Any, names: Sequence[str], step: float = 1e-3
) -> Tensor:
    """The Hessian of the loss from its values alone, by parameters that move and come back."""
    model.eval()
    params = [p for name, p in model.named_parameters() if name in names]
    start = torch.nn.utils.parameters_to_vector(params).detach()
    units = step * torch.eye(len(start), dtype=start.dtype)

    @torch.no_grad()
    def loss(place: Tensor) -> float:
        torch.nn.utils.vector_to_parameters(place, params)
        return float(loss_fn(model, batch))

    hessian = torch.zeros_like(units)
    for i, j in itertools.combinations_with_replacement(range(len(start)), 2):
        corners = [a * b * loss(start + a * units[i] + b * units[j]) for a, b in itertools.product((1, -1), repeat=2)]
        hessian[i, j] = hessian[j, i] = sum(corners) / (4 * step**2)
    torch.nn.utils.vector_to_parameters(start, params)
    return hessian


def assert_right(result: SharpnessResult | None, hessian: Tensor, error: float = 1e-9) -> None:
    if result is None:
        return
    exact = torch.linalg.eigvalsh(hessian).flip(0)[: len(result.eigenvalues)].tolist()
    for value, residual, right in zip(result.eigenvalues, result.residuals, exact, strict=True):
        assert abs(value - right) <= residual * abs(value) + error, (result.eigenvalues, exact)


@pytest.mark.parametrize("sizes", [SIZES, [20, 20, 20], [60]], ids=str)
@pytest.mark.parametrize("name", NO_MEANS)
def test_a_loss_that_is_no_mean_over_samples(name: str, sizes: list[int]) -> None:
    model, loss_fn, whole = mlp(), NO_MEANS[name], data()
    names = [parameter for parameter, _ in model.named_parameters()]
    exact = hessian_of_batches(model, loss_fn, [whole], [1], names)
    assert_right(silent_result(model, loss_fn, in_batches(whole, sizes)), exact)


@pytest.mark.parametrize("name", NO_DERIVATIVES)
def test_a_gradient_that_is_no_derivative(name: str) -> None:
    build, loss_fn, params = NO_DERIVATIVES[name]
    model, whole = build(), data()
    result = silent_result(model, loss_fn, in_batches(whole, SIZES), params=params)
    if result is not None:
        exact = second_differences(model, loss_fn, whole, result.parameter_names)
        assert_right(result, exact, 1e-4 * float(exact.norm()))


@pytest.mark.parametrize("name", UNSTEADY)
def test_a_loss_that_is_another_in_each_call(name: str) -> None:
    build, loss_fn = UNSTEADY[name]
    assert silent_result(build(), loss_fn, in_batches(data(), SIZES)) is None


def test_second_differences_are_those_of_a_network() -> None:
    model, whole = mlp(), data()
    names = [parameter for parameter, _ in model.named_parameters()]
    exact = hessian_of_batches(model, NO_MEANS["sum"], [whole], [1], names)
    found = second_differences(model, NO_MEANS["sum"], whole, names)
    assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())
