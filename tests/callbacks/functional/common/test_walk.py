import torch
from torch import nn

from moe_heads.callbacks.functional.common.walk import Walk


def test_goes_from_the_start_and_moves_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    step = {"0.weight": torch.ones(2, 2)}
    walk = Walk(model, [step, {"0.weight": 10 * torch.eye(2)}])
    for _ in range(3):
        walk.go([0.5, -1.0])
        torch.testing.assert_close(model[1].weight.detach(), start + 0.5 - 10 * torch.eye(2))
    walk.go([0.0, 0.0])
    assert torch.equal(model[0].weight, start) and model[0].weight.requires_grad
