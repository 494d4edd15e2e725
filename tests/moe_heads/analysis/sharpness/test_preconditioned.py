"""Preconditioned sharpness, against a dense Hessian in float64, and thresholds against optimizers on quadratics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import preconditioned_sharpness, preconditioner_of
from moe_heads.analysis.sharpness.hessian.scaled import ScaledOperator
from moe_heads.analysis.sharpness.preconditioner import preconditioned_threshold
from tests.support.lightning_models import assert_same, snapshot

OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 4, generator=generator), torch.randint(3, (24,), generator=generator)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](model.parameters())
    batch = data()[0].to(dtype), data()[1]
    for _ in range(10):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return model, optimizer, batch


def dense(model: nn.Module, batch: Any, diagonal: dict[str, Tensor]) -> Tensor:
    """Eigenvalues of the dense preconditioned Hessian in float64, descending."""
    own = {name: p.detach().double() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in own.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = {n: v.view_as(p) for (n, p), v in zip(own.items(), vector.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (batch[0].double(),)), batch[1])

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in own.values()]))
    scale = torch.cat([diagonal[name].double().flatten() for name in own]).rsqrt()
    values: Tensor = torch.linalg.eigvalsh(scale[:, None] * hessian * scale).flip(0)
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_dense_matrix(name: str) -> None:
    model, optimizer, batch = trained(name)
    diagonal = preconditioner_of(optimizer, model)
    before = snapshot(model)
    found = preconditioned_sharpness(model, loss_fn, [batch], diagonal, num_eigenvalues=2)
    assert_same(before, snapshot(model))
    exact = dense(model, batch, diagonal)
    assert found.converged and found.num_parameters == len(exact)
    assert found.eigenvalues == pytest.approx(exact[:2].tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["Adam", "amsgrad", "RMSprop", "centered"])
def test_the_preconditioner_is_what_the_step_divides_by(name: str) -> None:
    model, optimizer, batch = trained(name, torch.float64)
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    diagonal = preconditioner_of(optimizer, model)
    for n, p in model.named_parameters():
        numerator = gradients[n]
        if "RMSprop" not in type(optimizer).__name__:
            numerator = optimizer.state[p]["exp_avg"] / (1 - 0.9**11)
        assert torch.allclose(p.detach() - before[n], -0.01 * numerator / diagonal[n], rtol=1e-9, atol=1e-15)


def diverges(eigenvalue: float, optimizer_of: Any) -> bool:
    """Whether the optimizer leaves the minimum of a quadratic, with gradients so small that D = eps = 1."""
    weight = nn.Parameter(torch.full((1,), 1e-30, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    sizes = []
    for _ in range(400):
        weight.grad = eigenvalue * weight.detach()
        optimizer.step()
        sizes.append(abs(float(weight.detach())))
        if sizes[-1] > 1e-6:
            return True
    return sizes[-1] > sizes[100]  # after the bias correction


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, eps=1.0),
        lambda p: torch.optim.AdamW(p, lr=0.1, eps=1.0, betas=(0.5, 0.99), weight_decay=2.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1, eps=1.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1, eps=1.0, momentum=0.8),
    ],
)
def test_the_optimizer_diverges_just_above_the_threshold(optimizer_of: Any) -> None:
    threshold = preconditioned_threshold(optimizer_of([nn.Parameter(torch.ones(1))]))
    assert threshold is not None
    assert diverges(1.02 * threshold, optimizer_of) and not diverges(0.98 * threshold, optimizer_of)


def test_thresholds_that_are_known_and_unknown() -> None:
    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(1))]

    assert preconditioned_threshold(torch.optim.Adam(parameters(), lr=0.1)) == pytest.approx(380)
    assert preconditioned_threshold(torch.optim.SGD(parameters(), lr=0.1)) is None
    assert preconditioned_threshold(torch.optim.Adam(parameters(), weight_decay=0.1)) is None
    assert preconditioned_threshold(torch.optim.Adam(parameters(), maximize=True)) is None
    groups = [{"params": parameters(), "lr": rate} for rate in (0.1, 0.2)]
    assert preconditioned_threshold(torch.optim.Adam(groups)) is None


def test_a_start_saves_products_and_a_part_of_the_parameters() -> None:
    model, optimizer, batch = trained("Adam")
    diagonal = preconditioner_of(optimizer, model)
    first = preconditioned_sharpness(model, loss_fn, [batch], diagonal, threshold=7.0)
    again = preconditioned_sharpness(model, loss_fn, [batch], diagonal, start=first.start)
    assert again.num_products < first.num_products
    assert again.lambda_max == pytest.approx(first.lambda_max, rel=1e-5)
    part = {"2.weight": diagonal["2.weight"]}
    assert preconditioned_sharpness(model, loss_fn, [batch], part).num_parameters == 18
    assert first.metrics()["threshold"] == 7.0 and "stability threshold" in first.summary()


def test_wrong_input() -> None:
    model, _, batch = trained("Adam")
    for given, message in (
        ({}, "expected a tensor by name"),
        ({"nowhere": torch.ones(1)}, "nowhere"),
        ({"0.bias": torch.ones(2)}, r"expected shape \(6,\) for '0.bias', got \(2,\)"),
        ({"0.bias": torch.zeros(6)}, "finite numbers above 0"),
        ({"0.bias": torch.full((6,), math.nan)}, "finite numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            preconditioned_sharpness(model, loss_fn, [batch], given)
    with pytest.raises(ValueError, match=r"expected Adam, AdamW or RMSprop.*got SGD"):
        preconditioner_of(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="expected the state of at least one step"):
        preconditioner_of(torch.optim.Adam(model.parameters()), model)


def test_the_scaled_operator_checks_its_scale() -> None:
    class Identity:
        shape, dtype, device = (2, 2), torch.float32, torch.device("cpu")

    with pytest.raises(ValueError, match="expected 2 finite numbers above 0"):
        ScaledOperator(Identity(), torch.tensor([1.0, 0.0]))
