import numpy as np
import pytest
import torch

from moe_heads.analysis.sharpness.hessian.density import has_settled, spectral_density
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from tests.support.hessians import DenseOperator, symmetric


def runs(operator: DenseOperator, num: int, steps: int = 20) -> list[LanczosResult]:
    generator = torch.Generator().manual_seed(0)
    return [
        lanczos(operator, generator=generator, num_eigenvalues=1, min_steps=steps, max_steps=steps) for _ in range(num)
    ]


def random_operator(dim: int = 300) -> DenseOperator:
    values = torch.cat([torch.tensor([8.0, 5.0]).double(), torch.randn(dim - 2, dtype=torch.float64)])
    return DenseOperator(symmetric(values))


def test_integrates_to_one() -> None:
    density = spectral_density(runs(random_operator(), 1))
    assert float(torch.trapezoid(density.values, density.grid)) == pytest.approx(1, abs=1e-5)
    assert float(density.weights.sum()) == pytest.approx(1)
    assert (density.values >= 0).all() and density.grid.shape == density.values.shape == (1024,)


def test_moments_of_the_start_vector_are_exact() -> None:
    operator = random_operator()
    (run,) = runs(operator, 1, steps=6)
    density = spectral_density([run])
    start = run.basis.combined(torch.eye(6, dtype=torch.float64)[:1])[0]
    # Gauss quadrature of m nodes is exact up to degree 2m - 1.
    for power in range(12):
        exact = start @ torch.linalg.matrix_power(operator.matrix, power) @ start
        torch.testing.assert_close(density.weights @ density.nodes**power, exact, rtol=1e-9, atol=1e-9)


def test_moments_estimate_the_traces() -> None:
    operator = random_operator()
    all_runs = runs(operator, 30)
    for power in (1, 2):
        moments = torch.stack([r.ritz[1][0].square() @ r.ritz[0] ** power for r in all_runs])
        pooled = spectral_density(all_runs)
        estimate = pooled.weights @ pooled.nodes**power
        torch.testing.assert_close(estimate, moments.mean())
        exact = torch.linalg.matrix_power(operator.matrix, power).trace() / 300
        assert abs(float(estimate - exact)) < 4 * float(moments.std()) / 30**0.5


def test_density_of_many_runs_is_the_broadened_spectrum() -> None:
    operator = random_operator()
    density = spectral_density(runs(operator, 30, steps=40), sigma=0.5)
    values = torch.linalg.eigvalsh(operator.matrix)
    exact = torch.exp(-((density.grid[:, None] - values) ** 2) / 0.5).mean(1) / (0.5 * np.sqrt(2 * np.pi))
    assert float((density.values - exact).abs().max()) < 0.05 * float(exact.max())


def test_broadening_is_the_stated_one() -> None:
    density = spectral_density(runs(DenseOperator(2.0 * torch.eye(30).double()), 1), sigma=0.1)
    mean = torch.trapezoid(density.values * density.grid, density.grid)
    variance = torch.trapezoid(density.values * (density.grid - mean) ** 2, density.grid)
    assert float(mean) == pytest.approx(2) and float(variance) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e9])
def test_spectrum_of_one_point(scale: float) -> None:
    density = spectral_density(runs(DenseOperator(scale * torch.eye(30).double()), 1))
    assert float(torch.trapezoid(density.values, density.grid)) == pytest.approx(1, abs=1e-5)
    assert float(density.grid[density.values.argmax()]) == pytest.approx(scale, abs=density.sigma)


def test_a_settled_density_stays_as_it_is() -> None:
    # a few large eigenvalues and many small ones, as of a trained network
    operator = DenseOperator(symmetric(torch.logspace(1, -4, 400, dtype=torch.float64)))
    (full,) = runs(operator, 1, steps=100)
    options = {"num_eigenvalues": 1, "min_steps": 100, "max_steps": 100}
    generator = torch.Generator().manual_seed(0)
    short = lanczos(operator, generator=generator, has_settled=has_settled, **options)
    assert 8 < len(short.quadrature) < 50
    early, late = spectral_density([short]), spectral_density([full])
    values = np.interp(early.grid.numpy(), late.grid.numpy(), late.values.numpy())
    # the same start, so that the difference is that of the steps alone
    assert (np.abs(early.values.numpy() - values) <= 0.5 * early.stderr.numpy() + 1e-3 * values.max()).all()
    assert float(early.stderr.max()) == pytest.approx(float(late.stderr.max()), rel=0.15)
    assert not has_settled(runs(operator, 1, steps=3)[0])


def test_the_iteration_ends_with_a_settled_density() -> None:
    operator = random_operator()
    options = {"num_eigenvalues": 1, "min_steps": 40}
    long, short = (
        lanczos(operator, generator=torch.Generator().manual_seed(0), has_settled=has, **options)
        for has in (None, lambda run: run.num_steps >= 25)
    )
    assert len(long.quadrature) == 40 and len(short.quadrature) == 25
    assert long.converged and short.converged


def test_bad_arguments() -> None:
    one = runs(random_operator(20), 1, steps=5)
    with pytest.raises(ValueError, match="runs: expected at least one"):
        spectral_density([])
    with pytest.raises(ValueError, match="sigma: expected a finite number above 0, got -1"):
        spectral_density(one, sigma=-1)
    with pytest.raises(ValueError, match=r"num_points: expected at least \d+, .*got 50"):
        spectral_density(one, num_points=50)


def test_standard_error_bounds_the_spread_over_starts() -> None:
    operator = random_operator(200)
    found = [spectral_density([run], sigma=0.4) for run in runs(operator, 60, steps=40)]
    # the grids differ by their ends, a little
    grid = np.linspace(-2, 9, 23)
    values = np.stack([np.interp(grid, f.grid.numpy(), f.values.numpy()) for f in found])
    eigenvalues = torch.linalg.eigvalsh(operator.matrix).numpy()
    exact = np.exp(-((grid[:, None] - eigenvalues) ** 2) / (2 * 0.4**2)).mean(1) / (0.4 * (2 * np.pi) ** 0.5)
    bound = np.mean([np.interp(grid, f.grid.numpy(), f.stderr.numpy()) ** 2 for f in found], axis=0) ** 0.5
    spread = values.std(0, ddof=1)
    assert (spread < 1.3 * bound).all() and (spread > 0.5 * bound).any()
    np.testing.assert_array_less(np.abs(values.mean(0) - exact), 4 * bound / np.sqrt(60) + 1e-6)
    several = spectral_density(runs(operator, 4, steps=40), sigma=0.4)
    assert float(several.stderr.max()) == pytest.approx(float(found[0].stderr.max()) / 2, rel=0.3)
