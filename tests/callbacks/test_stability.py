from typing import Any

import pytest
import torch
from torch import Tensor

from moe_heads.callbacks._stability import stability_threshold


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], **options)


def diverges(eigenvalue: float, options: dict[str, Any]) -> bool:
    """Whether the optimizer leaves the minimum of a quadratic of this curvature."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], **options)

    def loss() -> Tensor:
        return 0.5 * eigenvalue * weight.square().sum()

    for _ in range(2000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if abs(float(weight.detach())) > 1e6:
            return True
    return False


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.01, "momentum": 0.5, "weight_decay": 3.0},
    ],
)
def test_the_optimizer_diverges_just_above_it(options: dict[str, Any]) -> None:
    threshold = stability_threshold([sgd(**options)])
    assert threshold is not None
    assert diverges(1.02 * threshold, options) and not diverges(0.98 * threshold, options)


def test_unknown_for_other_optimizers_and_settings() -> None:
    assert stability_threshold([]) is None
    assert stability_threshold([sgd(lr=0.1), sgd(lr=0.1)]) is None
    assert stability_threshold([torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])]) is None
    assert stability_threshold([sgd(lr=0.1, momentum=0.9, dampening=0.1)]) is None
    assert stability_threshold([sgd(lr=0.0)]) is None
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.2)]
    assert stability_threshold([torch.optim.SGD(groups, lr=0.1)]) is None
