import math

import pytest
import torch
from torch import Tensor

from moe_heads.analysis.loss_landscape.validity import (
    check_curvature,
    crossing_radius,
    largest_rise,
    second_difference,
)


def side(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def test_second_difference_takes_the_nearest_symmetric_pair() -> None:
    axis = torch.tensor([-1.0, -0.5, -0.2, 0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    assert second_difference(axis, 3 * axis.square() + axis) == pytest.approx(6)
    assert second_difference(axis, axis.pow(4)) == pytest.approx(0.5**2 * 2)  # at 0.5
    assert second_difference(axis + 0.01, axis) is None
    assert second_difference(axis[3:], axis[3:]) is None


def test_radius_of_a_parabola_and_of_a_cone() -> None:
    axis = side(201)
    assert crossing_radius([axis], 1 + 4 * axis.square(), 2.0, 1.0) == pytest.approx(0.5, abs=1e-4)
    assert crossing_radius([axis], 1 + 4 * axis.square(), 6.0, 1.0) == math.inf
    cone = (axis[:, None].square() + axis.square()).sqrt()
    assert crossing_radius([axis, axis], cone, 0.333, 0.0) == pytest.approx(0.333, abs=1e-3)
    assert crossing_radius([axis, axis], (axis[:, None] - 3 * axis).abs(), 0.3, 0.0) == pytest.approx(
        0.3 / 10**0.5, abs=5e-3
    )


def test_what_is_not_finite_has_risen_at_its_own_place() -> None:
    axis = side(5)
    for value in (math.inf, math.nan):
        losses = torch.tensor([1.0, 1.0, 1.0, value, 1.0], dtype=torch.float64)
        assert crossing_radius([axis], losses, 2.0, 1.0) == 0.5
        assert largest_rise([axis], losses, 1.0, 0.5) == math.inf
        assert math.isnan(largest_rise([axis], losses, 1.0, 0.4))  # only the center lies so near


def test_a_center_off_the_grid_is_where_the_loss_rises_from() -> None:
    axis = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    for values in ([3.0, 4.0, 5.0], [3.0, 1.0, 5.0]):
        losses = torch.tensor(values, dtype=torch.float64)
        assert crossing_radius([axis], losses, 2.0, 1.0) == 0.25
        assert crossing_radius([axis - 2], losses.flip(0), 2.0, 1.0) == 0.25
    assert crossing_radius([axis], torch.full((3,), 1.5), 2.0, 1.0) == math.inf
    assert crossing_radius([axis], torch.full((3,), math.nan), 2.0, 1.0) == 0.5
    # on both sides, along both axes
    even = side(4)
    cone = 3 * (even[:, None].square() + even.square()).sqrt()
    assert crossing_radius([even, even], 1 + cone, 1.3, 1.0) == pytest.approx(0.1)
    assert crossing_radius([even, side(3)], 1 + 3 * (even[:, None].abs() + 0 * side(3)), 1.3, 1.0) == pytest.approx(0.1)


def test_largest_rise_within_a_disc() -> None:
    axis = side(5)
    surface = axis[:, None].square() + 2 * axis.square()
    assert largest_rise([axis, axis], surface, 0.0, 0.5) == 0.5
    assert largest_rise([axis, axis], surface, 0.0, 1.0) == 2.0


def test_a_check_knows_how_far_off_it_may_be() -> None:
    def wavy(x: float) -> float:
        return 1 + 3 * x**2 + 50 * x**4

    check = check_curvature(wavy, 1.0, 6.0, 0.1, 1e-6)
    assert check.agrees
    assert check.second_difference - 6 == pytest.approx(check.truncation, rel=1e-6)  # exact for x^4
    assert not check_curvature(wavy, 1.0, 7.0, 0.1, 1e-10).agrees
    # a step never beyond the grid's first point, also where the curvature is zero
    assert check_curvature(lambda x: 1.0, 1.0, 0.0, 0.1, 1e-6).step == 0.1
