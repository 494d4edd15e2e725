"""Errors of derivatives, of repeated evaluations and of the range of a data type are part of a result, or warn."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_heads.analysis import sharpness
from tests.support.hessians import Batch, cross_entropy
from tests.support.oracle_hessians import hessian_of_batches


class _ScaledTanh(torch.autograd.Function):
    """tanh whose gradient is too large by a factor, and is differentiated correctly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return slopes[0] * (1 - y * y) * ctx.factor, None


def problem() -> tuple[nn.Sequential, Batch]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 6))
    return model, (torch.randn(30, 5), torch.randint(6, (30,)))


def exact_eigenvalues(model: nn.Module, batch: Batch, penalty: float = 0.0) -> Tensor:
    """Those of the loss, with a penalty c·‖W‖² of the last layer."""
    double = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    double.load_state_dict(model.state_dict())

    def loss(m: Any, b: Batch) -> Tensor:
        return cross_entropy(m, b) + penalty * m[2].weight.square().sum()

    names = [name for name, _ in double.named_parameters()]
    wide = batch[0].double(), batch[1]
    return torch.linalg.eigvalsh(hessian_of_batches(double, loss, [wide], [1], names)).flip(0)


@pytest.mark.parametrize("factor", [1.0, 1.0001, 1.001, 1.01])
def test_a_small_error_of_the_gradient_is_part_of_the_residuals(factor: float) -> None:
    model, batch = problem()
    exact = exact_eigenvalues(model, batch)[:5]

    def loss(m: Any, b: Batch) -> Tensor:
        return F.cross_entropy(m[2](_ScaledTanh.apply(m[0](b[0]), factor)), b[1])

    if factor < 1.001:
        result = sharpness(model, loss, [batch])
        assert result.eigenvalues_converged
    else:
        with pytest.warns(UserWarning, match="the derivatives differ from finite differences, the gradient by"):
            result = sharpness(model, loss, [batch])
        assert not result.eigenvalues_converged and "a custom backward or a detach()" in result.summary()
    for value, residual, true in zip(result.eigenvalues, result.residuals, exact.tolist(), strict=True):
        assert abs(value - true) <= residual * abs(value)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_a_small_detached_part_of_the_loss_is_part_of_the_errors(size: float) -> None:
    model, batch = problem()

    def loss(m: Any, b: Batch) -> Tensor:
        weight = m[2].weight
        return cross_entropy(m, b) + size * (weight.detach() * weight).sum()

    exact = exact_eigenvalues(model, batch, size)
    if size < 1e-4:
        result = sharpness(model, loss, [batch])
    else:
        with pytest.warns(UserWarning, match="the derivatives differ from finite differences"):
            result = sharpness(model, loss, [batch])
    for value, residual, true in zip(result.eigenvalues, result.residuals, exact.tolist(), strict=False):
        assert abs(value - true) <= residual * abs(value)
    assert abs(result.trace - float(exact.sum())) <= 4 * result.trace_stderr


def test_derivatives_of_a_loss_that_draws_random_numbers_are_checked() -> None:
    model, batch = problem()

    def loss(m: Any, b: Batch) -> Tensor:
        torch.rand(1)
        weight = m[2].weight
        return cross_entropy(m, b) + 0.05 * (weight.detach() * weight).sum()

    with pytest.warns(UserWarning, match="The gradient is not the derivative of the loss"):
        result = sharpness(model, loss, [batch])
    assert not result.eigenvalues_converged and not result.trace_converged


def test_dropout_in_the_loss_passes_the_checks_of_the_derivatives() -> None:
    model, batch = problem()
    result = sharpness(model, lambda m, b: F.cross_entropy(F.dropout(m(b[0]), 0.3, training=True), b[1]), [batch])
    assert result.eigenvalues_converged and result.certificate is not None
    assert result.certificate.curvature_error < 1e-6 and result.certificate.derivative_error < 1e-6
    assert "the loss draws random numbers" in result.certificate.unchecked["products in float64"]


@pytest.mark.filterwarnings("ignore:loss_fn. expected the mean over the samples")  # chance decides whether it warns
@pytest.mark.parametrize("draw", [random.Random(0).random, np.random.default_rng(0).random], ids=["random", "numpy"])
def test_random_numbers_outside_torch_are_named(draw: Any) -> None:
    model, batch = problem()
    with pytest.warns(UserWarning, match=r"The loss changes by .* when it is evaluated again .* \(random, numpy\)"):
        result = sharpness(model, lambda m, b: cross_entropy(m, b) * (1 + 0.01 * draw()), [batch])
    assert not result.eigenvalues_converged


class _Quadratic(nn.Module):
    """The Hessian of ``quadratic`` is diagonal."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones_like(curvatures))
        self.register_buffer("curvatures", curvatures)


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    return 0.5 * (model.get_buffer("curvatures") * model.get_parameter("w").square()).sum() * batch.mean()


@pytest.mark.parametrize(
    ("scale", "seed"),
    [
        # the processor is slow with numbers near the end of the range
        pytest.param(scale, seed, marks=[pytest.mark.slow] if scale < 1e-20 and seed else [])
        for scale in (1e-30, 1e-22, 1e-12, 1e12, 1e20)
        for seed in range(4)
    ],
)
def test_curvatures_outside_the_range_of_float32_are_not_certified(scale: float, seed: int) -> None:
    curvatures = torch.rand(200, generator=torch.Generator().manual_seed(seed)) * scale
    model, ones = _Quadratic(curvatures), torch.ones(8, 1)
    if 1e-19 < scale < 1e15:
        result = sharpness(model, quadratic, [ones], density=False)
        np.testing.assert_allclose(result.eigenvalues, curvatures.sort(descending=True).values[:5], rtol=1e-3)
        assert result.eigenvalues_converged
    else:
        with pytest.warns(UserWarning, match=r"leave the range of float32\. Multiply the loss by a number"):
            result = sharpness(model, quadratic, [ones], density=False)
        assert not result.eigenvalues_converged and not result.trace_converged


def test_the_error_of_a_trace_that_is_known_is_rounding() -> None:
    model = nn.Linear(20, 10)
    result = sharpness(
        model, lambda m, x: m(x).mean() + m.get_parameter("bias")[0] ** 2, [torch.randn(40, 20)], num_eigenvalues=1
    )
    assert 0 < abs(result.trace - 2) <= result.trace_stderr < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_products_are_symmetric_when_a_nearly_complete_basis_continues_from_a_small_remainder(seed: int) -> None:
    """The small remainder had lost its orthogonality, which looked like an asymmetry of up to 10 %."""
    torch.manual_seed(seed)
    model = nn.Linear(10, 12).double()
    batch = torch.randn(64, 10, dtype=torch.float64), torch.randn(64, 12, dtype=torch.float64)
    result = sharpness(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), [batch], num_eigenvalues=13, density=False)
    assert result.certificate is not None and result.certificate.asymmetry < 1e-10
    values = torch.tensor([-0.6, -0.5, 0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64).repeat(10)
    repeated = sharpness(_Quadratic(values), quadratic, [torch.ones(8, 1)], num_eigenvalues=8, density=False, seed=seed)
    assert repeated.certificate is not None and repeated.certificate.asymmetry < 1e-10


def test_a_part_that_stays_in_float32_is_no_error_of_the_derivatives() -> None:
    """Differences of such a loss are noise: the checks say that they were not possible, and nothing warns."""
    model, batch = problem()
    single = torch.from_numpy(np.zeros(1, np.float32))

    def loss(m: nn.Module, b: Batch) -> Tensor:
        return F.cross_entropy(m(b[0]).type_as(single), b[1])

    result = sharpness(model, loss, [batch])
    assert result.eigenvalues_converged and result.certificate is not None
    for check in ("gradient against finite difference", "product against finite difference"):
        assert "differences at two step sizes disagree" in result.certificate.unchecked[check]
    exact = exact_eigenvalues(model, batch)[:5]
    np.testing.assert_allclose(result.eigenvalues, exact, rtol=1e-3)


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(5, 12), nn.Tanh()), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=False)
        logits: Tensor = self.last(hidden)
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpointed_model_passes_every_check(dtype: torch.dtype) -> None:
    """In float64 the second computation of a checkpoint took the model's own parameters, which looked like an error."""
    _, batch = problem()
    result = sharpness(_Checkpointed().to(dtype), cross_entropy, [(batch[0].to(dtype), batch[1])], num_eigenvalues=3)
    assert result.eigenvalues_converged and result.certificate is not None and not result.certificate.unchecked
    assert result.certificate.curvature_error < 1e-6 and result.certificate.derivative_error < 1e-6
