"""Products by differences of gradients of whole models against the dense Hessian in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moe_heads.analysis import analysis_mode
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian import HessianOperator, lanczos
from moe_heads.analysis.sharpness.hessian.gradient_differences import StepsDisagreeError
from moe_heads.analysis.sharpness.hessian.sharded_differences import ShardedDifferences
from tests.support.sharded_models import SmoothNet, batches_of, loss_fn

SIZES = (12, 9, 6)


def operator_of(model: nn.Module, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> ShardedDifferences:
    data = Microbatches(batches_of(sizes, dtype), torch.device("cpu"), Progress())
    return ShardedDifferences(model, loss_fn, data, tolerance=1e-3, remedy="Take a rest.")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
def test_smooth_networks_agree_with_double_backward(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = SmoothNet(activation).double()
    exact = HessianOperator(model, loss_fn, batches_of(SIZES), mode="rebuilt")
    vector = torch.randn(exact.num_parameters, dtype=torch.float64)
    with analysis_mode(model):
        found = operator_of(model, torch.float64)
        product, of_stratum = found.matvec(vector), found.matvec(vector, stratum=1)
        found.matvec(vector)
    expected = exact.matvec(vector)
    assert float((product - expected).norm()) < 1e-7 * float(expected.norm())
    torch.testing.assert_close(of_stratum, exact.matvec(vector, stratum=1), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.forms, exact.forms, rtol=1e-6, atol=1e-9)
    assert found.center_loss == pytest.approx(exact.center_loss, rel=1e-12)
    assert found.repeat_error == 0
    assert found.num_products == 3


def test_lanczos_runs_on_it_unchanged() -> None:
    torch.manual_seed(0)
    model = SmoothNet().double()
    options = {"num_eigenvalues": 2, "tolerance": 1e-6}
    exact = HessianOperator(model, loss_fn, batches_of(SIZES), mode="rebuilt")
    expected = lanczos(exact, generator=torch.Generator().manual_seed(0), **options)
    with analysis_mode(model):
        found = lanczos(operator_of(model, torch.float64), generator=torch.Generator().manual_seed(0), **options)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-8)


def test_a_relu_network_in_single_precision_is_refused_with_the_number() -> None:
    torch.manual_seed(0)
    model = SmoothNet(nn.ReLU)
    before = [p.detach().clone() for p in model.parameters()]
    with analysis_mode(model), pytest.raises(ValueError, match=r"differ by \d+ % between.*Take a rest\.$"):
        found = operator_of(model, torch.float32, sizes=(400,))
        found.matvec(torch.ones(found.num_parameters))
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_what_is_accepted_of_relu_networks_is_right() -> None:
    """With few samples, some directions cross no kink."""
    num_accepted = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = SmoothNet(nn.ReLU)
        exact = HessianOperator(model, loss_fn, batches_of((27,), torch.float32), mode="rebuilt")
        vector = torch.randn(exact.num_parameters)
        expected = exact.matvec(vector)
        with analysis_mode(model):
            found = operator_of(model, torch.float32, sizes=(27,))
            try:
                product = found.matvec(vector)
            except StepsDisagreeError:
                continue
        num_accepted += 1
        assert float((product - expected).norm()) < 2e-3 * float(expected.norm())
    assert 0 < num_accepted < 4


def test_parameters_return_exactly_after_each_product() -> None:
    model = SmoothNet().double()
    before = [p.detach().clone() for p in model.parameters()]
    with analysis_mode(model):
        found = operator_of(model, torch.float64)
        found.matvec(torch.ones(found.num_parameters, dtype=torch.float64))
        assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
