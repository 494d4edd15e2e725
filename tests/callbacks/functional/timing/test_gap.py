import pytest
import torch

from moe_heads import SparseMoE, capacity
from moe_heads.callbacks.functional.timing.gap import Gap, GapPoint, break_even, dense_twin, realised_ratio


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 2.0, 3.0], 4.0),
        ([0.25, 0.5, 2.0], 64.0),
        ([2.0, 0.5, 2.0], 64.0),  # the last crossing, after which it stays
        ([1.0, 2.0, 2.0], 1.0),
        ([2.0, 2.0, 2.0], None),
        ([0.5, 0.5, 0.5], None),
        ([0.5, 2.0, 0.5], None),
        ([0.5, 2.0, 1.0], None),
    ],
)
def test_break_even_is_interpolated_in_the_logarithms(ratios: list[float], expected: float | None) -> None:
    assert break_even([1, 16, 256], ratios) == (None if expected is None else pytest.approx(expected))


def test_break_even_of_nothing_is_none() -> None:
    assert break_even([], []) is None


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.5, 2.0], "faster than the dense head from a batch of about 4 on"),
        ([1.5, 2.0], "faster than the dense head at every batch size from 1 to 16"),
        ([0.5, 0.9], "slower than the dense head at every batch size from 1 to 16"),
        ([2.0, 0.9], "faster than the dense head at some batch sizes from 1 to 16, not at the largest"),
    ],
)
def test_the_verdict_says_where_the_head_is_faster(ratios: list[float], verdict: str) -> None:
    points = tuple(GapPoint(size, "eager", 4.0, ratio, 0.1, 9.0) for size, ratio in zip((1, 16), ratios, strict=True))
    assert Gap("head", "eager", 10, 10, points, break_even([1, 16], ratios)).verdict() == verdict


def test_the_twin_is_dense_of_equal_capacity_where_the_head_is() -> None:
    head = SparseMoE(64, 10).to(torch.float64)
    twin = dense_twin(head)
    assert capacity(twin).total == pytest.approx(capacity(head).total, rel=0.05)
    assert capacity(twin).total == capacity(twin).active
    assert not twin.training
    assert twin(torch.randn(2, 64, dtype=torch.float64)).shape == (2, 10)
    with pytest.raises(ValueError, match="expected a number of parameters"):
        dense_twin(SparseMoE(64, 10, num_experts=1, k=1, expert_width=1, noisy=False, balance=None))


def test_the_ratio_is_that_of_the_medians_of_all_runs() -> None:
    dense, head = [[2.0, 2.0, 90.0]] * 6, [[1.0]] * 6
    # the bootstrap knows no error here; 2 % of each stay
    error = 2 * 0.02 * 2**0.5
    assert realised_ratio(dense, head, 0) == pytest.approx((2.0, 2 - error, 2 + error))
