from itertools import permutations

import pytest
import torch

from moe_heads.analysis.weight_matching.linear_assignment import best_assignment


def test_the_assignment_is_the_best_of_all_permutations() -> None:
    similarity = torch.randn(5, 5, dtype=torch.float64)
    columns, value = best_assignment(similarity)
    values = [
        sum(float(similarity[row, column]) for row, column in enumerate(order)) for order in permutations(range(5))
    ]
    assert value == pytest.approx(max(values))
    assert float(similarity[torch.arange(5), columns].sum()) == pytest.approx(value)


def test_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="weights: expected finite numbers"):
        best_assignment(torch.full((2, 2), torch.nan))
