import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights
from moe_heads.analysis.expert_utilization.weight_health import (
    WeightHealth,
    measure_weights,
    relative_to_median,
    weights_of_routers,
)


def measure(*matrices: Tensor) -> WeightHealth:
    return measure_weights(ExpertWeights(nn.Identity(), (), {str(n): matrix for n, matrix in enumerate(matrices)}))


def with_singular_values(values: list[float], rows: int, columns: int) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64))[0] for size in (rows, columns))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("size", [(5, 7), (70, 90), (90, 70)])
def test_known_singular_values(size: tuple[int, int]) -> None:
    values = [[3.0, 2.0, 1.0], [5.0, 5.0, 5.0], [4.0, 0.0, 0.0]]
    health = measure(torch.stack([with_singular_values(row, *size) for row in values]).float())
    squares = torch.tensor(values, dtype=torch.float64).square()
    torch.testing.assert_close(health.norms[:, 0], squares.sum(1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(health.stable_ranks[:, 0], squares.sum(1) / squares.amax(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(64, 300), (130, 200), (256, 256)])
def test_largest_singular_value_against_svd(dtype: torch.dtype, size: tuple[int, int]) -> None:
    stack = torch.randn(3, *size, dtype=torch.float32).to(dtype)
    health = measure(stack)
    wide = stack.double()
    exact = wide.square().sum((1, 2)) / torch.linalg.svdvals(wide)[:, 0].square()
    torch.testing.assert_close(health.norms[:, 0], wide.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    error = health.stable_ranks[:, 0] / exact - 1
    assert bool((error > -1e-5).all()) and bool((error < (1e-5 if size[0] == 64 else 0.012)).all())


@given(
    scales=st.lists(st.floats(1e-25, 1e15), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
def test_stable_rank_does_not_depend_on_the_scale_and_the_norm_is_proportional(scales: list[float], seed: int) -> None:
    matrix = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    health, one = measure(matrix * torch.tensor(scales)[:, None, None]), measure(matrix[None])
    torch.testing.assert_close(
        health.norms[:, 0], one.norms[0, 0] * torch.tensor(scales, dtype=torch.float64), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(health.stable_ranks, one.stable_ranks.expand(len(scales), 1), rtol=1e-4, atol=0)
    assert 1 <= float(one.stable_ranks) <= 4


def test_pieces_give_the_numbers_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(7, 80, 90)
    whole = measure(stack)
    monkeypatch.setattr(sys.modules[WeightHealth.__module__], "_MAX_ELEMENTS_ON_CPU", 3 * 80 * 90)
    pieces = measure(stack)
    torch.testing.assert_close(pieces.norms, whole.norms)
    torch.testing.assert_close(pieces.stable_ranks, whole.stable_ranks, rtol=1e-6, atol=0)


def test_zeros_and_nan() -> None:
    stack = torch.randn(4, 3, 5)
    stack[1] = 0
    health = measure(stack)
    assert float(health.norms[1, 0]) == float(health.stable_ranks[1, 0]) == 0
    assert float(health.relative_norms[1]) == 0
    assert health.metrics() == {"weight_norm_min": 0.0, "stable_rank_min": 0.0}
    stack[2, 0, 0] = math.nan
    health = measure(stack)
    assert bool(health.norms[2].isnan()) and bool(health.stable_ranks[2].isnan())
    assert math.isfinite(float(health.norms[3, 0]))
    assert health.metrics() == {}


def test_relative_to_the_median() -> None:
    assert relative_to_median(torch.tensor([1.0, 2.0, 4.0])).tolist() == [0.5, 1, 2]
    # two experts, one of them zero: the lower of the two middle values would be zero
    assert relative_to_median(torch.tensor([0.0, 3.0])).tolist() == [0, 2]
    assert relative_to_median(torch.tensor([0.0, 0.0, 3.0])).tolist() == [0, 0, math.inf]


def test_the_weakest_matrix_decides() -> None:
    first, second = torch.randn(1, 4, 3).repeat(5, 1, 1), torch.randn(1, 3, 4).repeat(5, 1, 1)
    second[3] *= 0.01
    relative = measure(first, second).relative_norms
    torch.testing.assert_close(relative, torch.tensor([1, 1, 1, 0.01, 1], dtype=torch.float64))


def test_nothing_of_the_model_or_of_torch_changes() -> None:
    head = SparseMoE(80, 70, num_experts=4, expert_width=70)
    head.experts.fc1.weight.grad = torch.ones_like(head.experts.fc1.weight)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    state = torch.get_rng_state()
    health = weights_of_routers(head, {"head": (head.router, 4), "unknown": (nn.Identity(), 4)})
    assert list(health) == ["head"] and not health["head"].norms.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((head.experts.fc1.weight.grad == 1).all())
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
