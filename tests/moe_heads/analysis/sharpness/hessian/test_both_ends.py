from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_heads.analysis.sharpness.hessian.both_ends import LowerEnd, by_magnitude, lower_end
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from tests.support.hessians import DenseOperator, symmetric


def both(values: Sequence[float] | Tensor, k: int, max_steps: int = 200) -> tuple[LanczosResult, LowerEnd]:
    operator = DenseOperator(symmetric(values))
    generator = torch.Generator().manual_seed(0)
    upper = lanczos(operator, generator=generator, num_eigenvalues=k, max_steps=max_steps)
    lower = lower_end(operator, upper, generator=generator, max_steps=max_steps)
    assert upper.num_steps + lower.num_steps == operator.num_products
    return upper, lower


def selected(upper: LanczosResult, lower: LowerEnd, k: int) -> list[float]:
    values = (*upper.eigenvalues, *lower.eigenvalues)
    return [values[place] for place in by_magnitude(upper.eigenvalues, lower.eigenvalues, k)]


BULK = torch.linspace(-0.1, 0.1, 80).tolist()


@pytest.mark.parametrize(
    "outliers",
    [
        [5.0, 4.0, 3.0, 2.0],  # none at the lower end
        [5.0, -6.0, 3.0, -2.0, 1.0],
        [-6.0, -5.0, -4.0, -3.5, -3.0],
        [4.0, -4.0, 2.0, -2.0],  # equal magnitudes
        [5.0, 4.0, -6.0],  # the next one is in the bulk
        [5.0, -3.0, -3.0, -3.0, 1.0],  # copies at the lower end
    ],
)
def test_the_largest_magnitudes_of_a_known_spectrum(outliers: list[float]) -> None:
    upper, lower = both([*outliers, *BULK], 3)
    assert upper.converged and lower.is_complete(upper)
    expected = sorted(map(abs, outliers), reverse=True)[:3]
    found = selected(upper, lower, 3)
    np.testing.assert_allclose(np.abs(found), expected, rtol=1e-5)
    assert all(min(abs(value - outlier) for outlier in outliers) < 1e-4 for value in found)


def test_random_spectra() -> None:
    """Property: with every certificate that holds, the k of largest magnitude are those of the matrix."""
    certified = 0
    for seed in range(10):
        values = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = values.sign() * values.abs() ** (1 + seed % 4)
        upper, lower = both(values, 4)
        if upper.converged and lower.is_complete(upper):
            certified += 1
            expected = values[values.abs().argsort(descending=True)[:4]]
            np.testing.assert_allclose(selected(upper, lower, 4), expected, rtol=1e-3)
    assert certified >= 9


def test_a_matrix_without_negative_eigenvalues_costs_few_more_products() -> None:
    upper, lower = both([5.0, 4.0, 3.0, *torch.linspace(0, 0.1, 80).tolist(), 0.0, 0.0], 3)
    assert lower.is_complete(upper)
    assert lower.krylov is None and lower.num_steps <= 20
    np.testing.assert_allclose(selected(upper, lower, 3), [5.0, 4.0, 3.0], rtol=1e-5)


def test_too_few_steps_are_not_certified() -> None:
    upper, lower = both([5.0, -6.0, 3.0, -2.0, *BULK], 3, max_steps=5)
    assert not (upper.converged and lower.is_complete(upper))


def test_all_of_a_small_matrix() -> None:
    upper, lower = both([2.0, -1.0, -3.0], 3)
    np.testing.assert_allclose(selected(upper, lower, 3), [-3.0, 2.0, -1.0], rtol=1e-9)
