import re

import numpy as np
import pytest
import torch

from moe_heads import Dense, MoELayer, SparseMoE, capacity
from moe_heads.analysis.inference_timing.speedup import (
    Gap,
    GapPoint,
    break_even,
    dense_twin,
    gap_of,
    realized_ratio,
)


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


def gap(intervals: list[tuple[float, float, float]]) -> Gap:
    """A gap of batch sizes 1, 4, 16, ..., of (low, realized, high)."""
    points = [GapPoint(4**i, "eager", 4.0, ratio, low, high) for i, (low, ratio, high) in enumerate(intervals)]
    heads = SparseMoE(16, 4, num_experts=2, expert_width=4, k=1), Dense(16, 4, width=8)
    return gap_of("head", "eager", heads, points)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.5, 0.5, 0.5), (2.0, 2.0, 2.0)], r"faster than the dense head from a batch size of about 2 \(.* to .*\)"),
        ([(1.4, 1.5, 1.6), (1.9, 2.0, 2.1)], "faster than the dense head at every batch size from 1 to 4"),
        ([(0.4, 0.5, 0.6), (0.8, 0.9, 0.95)], "slower than the dense head at every batch size from 1 to 4"),
        # the interval, or the allowance alone, reaches beyond one
        ([(0.9, 1.2, 1.5), (0.99, 1.01, 1.02)], "not distinguishable from the dense head at every"),
        ([(1.02, 1.02, 1.02), (0.98, 0.98, 0.98)], "not distinguishable from the dense head at"),
        (
            [(0.4, 0.5, 0.6), (0.9, 1.5, 2.5)],
            "slower than the dense head at batch size 1; not distinguishable from the dense head at batch size 4",
        ),
        (
            [(1.9, 2.0, 2.1), (1.9, 2.0, 2.1), (0.8, 0.9, 0.95)],
            "faster than the dense head at batch size 1, 4; slower than the dense head at batch size 16",
        ),
        ([(0.0, 0.5, float("inf"))] * 2, "not distinguishable from the dense head at every batch"),
    ],
)
def test_the_verdict_says_what_the_intervals_tell(intervals: list, verdict: str) -> None:
    assert re.match(verdict, gap(intervals).verdict())


def test_the_break_even_lies_between_the_crossings_of_the_ends() -> None:
    found = gap([(0.4, 0.5, 0.6), (0.8, 1.0, 1.5), (1.5, 2.0, 3.0)])
    assert found.break_even == pytest.approx(4.0)
    assert 1 < found.break_even_low < found.break_even < found.break_even_high < 16
    # upper ends that never fall below one give the smallest size
    assert gap([(0.4, 0.5, 1.6), (1.5, 2.0, 3.0)]).break_even_low == 1
    # no break-even unless the largest size is significantly faster
    assert gap([(0.4, 0.5, 0.6), (0.9, 1.5, 2.5)]).break_even is None
    assert gap([(0.4, 0.5, 0.6), (1.5, 2.0, float("inf"))]).break_even is not None


def test_the_twin_is_dense_of_equal_capacity_where_the_head_is() -> None:
    head = SparseMoE(64, 10).to(torch.float64)
    twin = dense_twin(head)
    assert capacity(twin).total == pytest.approx(capacity(head).total, rel=0.05)
    assert capacity(twin).total == capacity(twin).active
    assert not twin.training
    assert twin(torch.randn(2, 64, dtype=torch.float64)).shape == (2, 10)
    with pytest.raises(ValueError, match="expected a number of parameters"):
        dense_twin(SparseMoE(64, 10, num_experts=1, k=1, expert_width=1, num_shared_experts=0))


def test_the_twin_of_a_layer_keeps_the_tokens() -> None:
    layer = MoELayer(64, 10)
    twin = dense_twin(layer)
    assert capacity(twin).total == pytest.approx(capacity(layer).total, rel=0.05)
    x = torch.randn(2, 5, 64)
    assert twin(x, mask=torch.ones(2, 5, dtype=torch.bool)).shape == layer(x).shape == (2, 5, 10)
    assert twin.flops(2, 5).active == 10 * 2 * 74 * twin.dense.width
    first, _, _, second = twin.dense.layers.children()
    torch.testing.assert_close(twin(x), second(torch.nn.functional.gelu(first(x))))


def test_the_ratio_is_that_of_the_medians_of_all_runs_of_the_rounds_of_both() -> None:
    dense, head = [[2.0, 2.0, 90.0]] * 6, [[1.0]] * 6
    # nothing varies from round to round
    assert realized_ratio([dense], [head], 0) == (2.0, 2.0, 2.0)
    # a drift in rounds of the dense head only is in no common round
    assert realized_ratio([dense + [[80.0]] * 60], [head], 0) == (2.0, 2.0, 2.0)


def test_the_interval_of_the_ratio_contains_it() -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        dense, head = (rng.lognormal(size=(7, 2)).tolist() for _ in range(2))
        ratio, low, high = realized_ratio([dense], [head], trial)
        assert low <= ratio <= high
