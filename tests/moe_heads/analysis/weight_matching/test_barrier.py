import math

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis.weight_matching.barrier import line_loss, mean_loss
from moe_heads.analysis.weight_matching.tensors import tensors_of


class Point(nn.Module):
    """A parameter, a running statistic and a counter."""

    def __init__(self, value: float, number: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))
        self.register_buffer("mean", torch.tensor([2 * value]))
        self.register_buffer("number", torch.tensor([number]))


def loss_fn(model: Point, batch: Tensor) -> Tensor:
    return (1 - model.value.square()).mean() * batch.mean() + 0 * model.mean.sum()


def test_the_barrier_of_a_parabola_has_a_closed_form() -> None:
    """L(t) = c (1 - (2t - 1)²) on each batch: the barrier is the mean of c."""
    batches = [torch.full((2, 1), 1.0), torch.full((6, 1), 2.0), torch.full((2, 1), 5.0)]
    found = line_loss(Point(-1.0), tensors_of(Point(1.0)), loss_fn, batches)
    mean = (2 * 1 + 6 * 2 + 2 * 5) / 10
    assert found.barrier == pytest.approx(mean)
    assert found.losses == pytest.approx([mean * (1 - (2 * t - 1) ** 2) for t in found.positions], abs=1e-6)
    parts = [weight / 10 * (value - mean) for weight, value in ((2, 1), (6, 2), (2, 5))]
    assert found.stderr == pytest.approx(math.sqrt(sum(part**2 for part in parts) * 3 / 2))
    assert found.num_samples == 10


def test_a_line_that_bends_down_has_no_barrier() -> None:
    found = line_loss(Point(0.0), tensors_of(Point(1.0)), lambda m, b: m.value.square().mean(), [torch.ones(1, 1)])
    assert found.barrier == 0 and min(found.excesses) == pytest.approx(-0.25)
    assert math.isnan(found.stderr)


def test_buffers_are_interpolated_and_counters_are_those_of_the_nearer_end() -> None:
    model, seen = Point(0.0, 3), []

    def watch(model: Point, batch: Tensor) -> Tensor:
        seen.append((float(model.mean), int(model.number)))
        return model.value.sum()

    line_loss(model, tensors_of(Point(1.0, 7)), watch, [torch.ones(1, 1)], num_points=5)
    assert seen == [(0.0, 3), (0.5, 3), (1.0, 7), (1.5, 7), (2.0, 7)]
    assert float(model.value.detach()) == 0 and int(model.number) == 3


def test_both_ends_are_exact() -> None:
    first, second = Point(0.1), Point(0.7)
    batches = [torch.ones(3, 1)]
    found = line_loss(first, tensors_of(second), loss_fn, batches, num_points=3)
    assert found.losses[0] == mean_loss(first, loss_fn, batches)
    assert found.losses[-1] == mean_loss(second, loss_fn, batches)


def test_a_nan_makes_the_barrier_unknown() -> None:
    found = line_loss(Point(-1.0), tensors_of(Point(1.0)), lambda m, b: 1 / m.value.sum() * 0, [torch.ones(1, 1)])
    assert math.isnan(found.barrier)


def test_too_few_points_are_an_error() -> None:
    with pytest.raises(ValueError, match="num_points"):
        line_loss(Point(0.0), tensors_of(Point(1.0)), loss_fn, [torch.ones(1, 1)], num_points=2)
