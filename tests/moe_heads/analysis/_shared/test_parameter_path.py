import pytest
import torch
from torch import nn

from moe_heads.analysis._shared.parameter_path import ParameterPath, Target


def test_every_step_starts_from_the_start() -> None:
    model = nn.Linear(3, 2)
    start, step, other = (torch.randn(2, 3) for _ in range(3))
    model.weight.data.copy_(start)
    walk = ParameterPath(model, [{"weight": step}, {"weight": other}])
    for coordinates in ([0.5, 0.25], [-1.0, 0.0], [0.0, 3.0], [0.0, 0.0]):
        walk.go(coordinates)
        expected = start.clone().add_(step, alpha=coordinates[0]).add_(other, alpha=coordinates[1])
        assert torch.equal(model.weight, expected)


def test_the_end_of_a_segment_is_hit_to_the_bit() -> None:
    """An added difference misses it: 1e-9 is lost next to 1."""
    model = nn.BatchNorm1d(2)
    model.weight.data.fill_(1.0)
    end = torch.tensor([1e-9, 1 / 3])
    assert not torch.equal(model.weight + (end - model.weight), end)
    walk = ParameterPath(model, [{"weight": Target(end), "running_mean": Target(torch.ones(2))}])
    walk.go([1.0])
    assert torch.equal(model.weight, end)
    assert model.running_mean.tolist() == [1, 1]
    walk.go([0.5])
    assert model.running_mean.tolist() == [0.5, 0.5]
    walk.go([0.0])
    assert torch.equal(model.weight, torch.ones(2))


def test_a_segment_and_a_step_add_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    walk = ParameterPath(model, [{"weight": Target(torch.tensor([[6.0]]))}, {"weight": torch.tensor([[10.0]])}])
    walk.go([0.25, 2.0])
    assert model.weight.item() == 2 + 1 + 20
    assert walk.norms == (4.0, 10.0)


def test_what_does_not_move_is_not_held() -> None:
    model = nn.Linear(3, 2)
    asked = []
    walk = ParameterPath(
        model, [{"weight": torch.ones(2, 3), "bias": torch.zeros(2)}], lambda t: asked.append(t) or t.clone()
    )
    assert [t is model.weight for t in walk.moved] == [True]
    assert len(asked) == 1
    assert walk.norms == (pytest.approx(6**0.5),)


def test_an_expanded_parameter_moves_as_one() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1).expand(3))
    ParameterPath(model, [{"weight": torch.full((3,), 2.0)}]).go([1.0])
    assert model.weight.tolist() == [3, 3, 3]
