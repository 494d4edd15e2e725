"""The landscape on a CUDA device: unmeasured where there is none."""

import copy

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import direction_sweep, loss_landscape, normalized_random_direction
from tests.support.untouched import untouched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double().mean()


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Batch]]:
    head = SparseMoE(16, 3, num_experts=4, expert_width=8)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )
    x, y = torch.randn(30, 3, 8, 8, dtype=dtype), torch.randint(3, (30,))
    return model.to(dtype).eval(), list(zip(x.split([20, 10]), y.split([20, 10]), strict=True))


def on_gpu(batches: list[Batch]) -> list[Batch]:
    return [(x.cuda(), y.cuda()) for x, y in batches]


def test_the_center_is_the_loss_and_the_weights_are_put_back() -> None:
    model, batches = problem()
    model, batches = model.cuda(), on_gpu(batches)
    first, second = (normalized_random_direction(model, seed) for seed in (0, 1))
    with torch.no_grad():
        expected = sum(len(b[0]) * cross_entropy(model, b).item() for b in batches) / 30
    with untouched(model):
        plane = loss_landscape(
            model, cross_entropy, batches, direction1=first, direction2=second, num_points=5, accuracy_fn=accuracy
        )
    assert plane.center_loss == pytest.approx(expected, rel=1e-5)
    assert plane.losses[2, 2] == plane.center_loss
    assert plane.routing_flips is not None and plane.routing_flips[2, 2] == 0


@pytest.mark.parametrize("params", [None, ["5"]])
def test_the_plane_is_that_of_the_cpu(params: list[str] | None) -> None:
    """In float64, so that no sample chooses another expert for rounding."""
    model, batches = problem(torch.float64)
    there = copy.deepcopy(model).cuda()
    first, second = (normalized_random_direction(model, seed, params=params) for seed in (0, 1))
    here, gpu = (
        loss_landscape(
            m, cross_entropy, b, direction1=first, direction2=second, num_points=5, params=params, accuracy_fn=accuracy
        )
        for m, b in ((model, batches), (there, on_gpu(batches)))
    )
    torch.testing.assert_close(gpu.losses, here.losses, rtol=1e-9, atol=0)
    for name in ("losses_fixed_routing", "routing_flips", "accuracies"):
        torch.testing.assert_close(getattr(gpu, name), getattr(here, name), rtol=1e-9, atol=1e-12)
    assert gpu.reused == here.reused


def test_the_curvature_of_the_slice_and_a_sweep() -> None:
    model, batches = problem(torch.float64)
    model, batches = model.cuda(), on_gpu(batches)
    direction = normalized_random_direction(model, 0)
    line = loss_landscape(model, cross_entropy, batches, direction1=direction, num_points=5, check_curvatures=True)
    assert len(line.checks) == 1
    with untouched(model):
        sweep = direction_sweep(model, cross_entropy, batches, num_directions=3, num_points=5)
    assert sweep.center_loss == line.center_loss and sweep.num_nonfinite == 0
