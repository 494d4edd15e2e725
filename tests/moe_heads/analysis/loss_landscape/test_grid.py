import math

import pytest
import torch

from moe_heads.analysis.loss_landscape.grid import grid_of, grid_through_zero, widest_gap


def test_linspace_hits_zero() -> None:
    assert grid_of("alphas", torch.linspace(-0.5, 0.5, 21), 1.0, 3)[10] == 0
    assert grid_of("alphas", None, 2.0, 5).tolist() == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize(("values", "num_points"), [([3.0], 5), ([-1.0, 7.0], 9), ([0.0], 4), ([-1e-9], 3)])
def test_a_grid_through_zero_covers_the_values(values: list[float], num_points: int) -> None:
    grid = grid_through_zero(torch.tensor(values, dtype=torch.float64), num_points)
    assert len(grid) == num_points
    assert 0 in grid.tolist()
    assert grid[0] <= min(*values, 0.0) and grid[-1] >= max(*values, 0.0)
    torch.testing.assert_close(grid.diff(), grid.diff()[:1].expand(num_points - 1))


def test_the_widest_gap_is_where_the_loss_bends() -> None:
    alphas = torch.linspace(-1, 1, 9, dtype=torch.float64)
    assert widest_gap(alphas, (alphas - 0.6).abs()) in {0.375, 0.625}
    assert widest_gap(alphas, alphas) is None  # a straight line misses nothing
    assert widest_gap(alphas[:2], alphas[:2]) is None


def test_the_error_of_the_interpolation_falls_as_points_are_added() -> None:
    """Against the same number of points spread evenly, on a curve with a narrow peak."""

    def curve(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + 400 * (x - 0.3).square())

    def error(x: torch.Tensor) -> float:
        fine = torch.linspace(-1, 1, 4001, dtype=torch.float64)
        right = torch.searchsorted(x, fine).clamp(1, len(x) - 1)
        low, high = x[right - 1], x[right]
        between = curve(low) + (fine - low) / (high - low) * (curve(high) - curve(low))
        return float((between - curve(fine)).abs().max())

    alphas = torch.linspace(-1, 1, 11, dtype=torch.float64)
    for _ in range(20):
        gap = widest_gap(alphas, curve(alphas))
        assert gap is not None
        alphas = torch.cat([alphas, torch.tensor([gap], dtype=torch.float64)]).sort().values
    assert error(alphas) < 0.2 * error(torch.linspace(-1, 1, 31, dtype=torch.float64))


def test_a_jump_does_not_draw_all_points_to_itself() -> None:
    alphas, asked = torch.linspace(-1, 1, 5, dtype=torch.float64), 0
    while (gap := widest_gap(alphas, (alphas > 0.1).double())) is not None:
        asked += 1
        alphas = torch.cat([alphas, torch.tensor([gap], dtype=torch.float64)]).sort().values
        assert asked < 30
    assert asked > 2


def test_a_gap_beside_what_is_not_finite_has_no_estimate() -> None:
    alphas = torch.linspace(-1, 1, 5, dtype=torch.float64)
    losses = torch.tensor([math.inf, math.nan, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert widest_gap(alphas, losses) is None
