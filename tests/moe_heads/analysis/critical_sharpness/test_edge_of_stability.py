"""Physics: with full batches, the sharpness of a small network rises to the stability threshold and hovers there."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import critical_sharpness, preconditioned_sharpness, preconditioner_of, update_of
from moe_heads.analysis.sharpness.preconditioner import preconditioned_threshold
from moe_heads.callbacks._stability import stability_threshold


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[:, 0], batch[1])


def trained(optimizer_of: Any, begin: int, end: int) -> tuple[list[float], list[float]]:
    """Return the largest eigenvalue and the critical sharpness over their thresholds, every 25 steps from `begin`."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(256, 8, generator=generator), torch.randn(256, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = optimizer_of(model.parameters())
    rate, ratios, criticals, start = optimizer.param_groups[0]["lr"], [], [], None
    for step in range(1, end + 1):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        is_due = step >= begin and step % 25 == 0
        if is_due:
            found = critical_sharpness(model, loss_fn, [batch], update_of(optimizer, model), learning_rate=rate)
            criticals.append(found.lambda_c / found.threshold)
        optimizer.step()
        if is_due:
            threshold = stability_threshold([optimizer]) or preconditioned_threshold(optimizer)
            diagonal = {name: torch.ones_like(p) for name, p in model.named_parameters()}
            if not isinstance(optimizer, torch.optim.SGD):
                diagonal = preconditioner_of(optimizer, model)
            sharpness = preconditioned_sharpness(model, loss_fn, [batch], diagonal, start=start)
            start = sharpness.start
            assert sharpness.converged and threshold is not None
            ratios.append(sharpness.lambda_max / threshold)
    return ratios, criticals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer_of", "begin", "end"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.05), 1200, 1600),
        (lambda p: torch.optim.SGD(p, lr=0.06, momentum=0.5), 650, 950),
        (lambda p: torch.optim.Adam(p, lr=0.005), 200, 600),
    ],
    ids=["SGD", "momentum", "Adam"],
)
def test_the_largest_eigenvalue_hovers_at_the_threshold(optimizer_of: Any, begin: int, end: int) -> None:
    ratios, criticals = trained(optimizer_of, begin, end)
    assert statistics.median(ratios) == pytest.approx(1, abs=0.1), (ratios, criticals)
    if begin == 1200:  # the steps of gradient descent alone oscillate along the first eigenvector
        assert statistics.median(criticals) == pytest.approx(1, abs=0.1), criticals


@pytest.mark.slow
def test_a_smaller_learning_rate_stays_below() -> None:
    ratios, criticals = trained(lambda p: torch.optim.SGD(p, lr=0.005), 200, 300)
    assert max(ratios) < 0.3 and max(criticals) < 0.3
