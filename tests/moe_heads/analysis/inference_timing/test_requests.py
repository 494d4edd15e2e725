"""Batches of each size: rows of an example or draws of a function, and their number."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SoftMoE, SparseMoE
from moe_heads.analysis import inference_timing
from moe_heads.analysis._shared.batches import call_model
from moe_heads.analysis.inference_timing.requests import Requests, is_batch_fn, requests_of
from tests.support.untouched import untouched

CPU = torch.device("cpu")
QUICK = {"num_runs": 10, "warmup_runs": 0}


def requests(model: nn.Module, example: object, sizes: tuple[int, ...], num_draws: int | None = None) -> Requests:
    return requests_of(model, example, sizes, call_model, num_draws=num_draws, seed=0, device=CPU)


def sparse() -> SparseMoE:
    return SparseMoE(4, 2, num_experts=4, expert_width=4)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def of_lengths(lengths: Iterator[int]) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, next(lengths), 3)


def test_rows_of_an_example_are_one_draw_of_a_model_without_a_router() -> None:
    for model in (nn.Linear(4, 2), SoftMoE(4, 2, num_experts=2, expert_width=2)):
        found = requests(model, torch.randn(12, 4), (1, 4))
        assert [len(found.draws(size)) for size in (1, 4)] == [1, 1]
        assert found.report().why_draws.startswith("one, because all samples have the same shape")


def test_rows_of_an_example_are_disjoint_draws_of_a_model_that_chooses_experts() -> None:
    x = torch.arange(48.0).view(12, 4)
    found = requests(sparse(), x, (1, 4, 8, 20))
    draws = {size: found.draws(size) for size in (1, 4, 8, 20)}
    assert {size: len(batches) for size, batches in draws.items()} == {1: 5, 4: 3, 8: 1, 20: 1}
    assert torch.equal(torch.cat(draws[4]), x)
    assert torch.equal(draws[20][0], torch.cat([x, x[:8]]))
    assert "routers choose experts" in found.report().why_draws
    assert len(requests(sparse(), x, (1,), num_draws=2).draws(1)) == 2


def test_a_function_is_called_once_for_large_sizes_if_all_shapes_are_equal() -> None:
    calls = []

    def draw(size: int) -> tuple[Tensor, list[str]]:
        calls.append(size)
        # strings that the forward pass does not get are no reason for several draws
        return torch.randn(size, 4), ["x" * len(calls)] * size

    found = requests(nn.Linear(4, 2), draw, (2, 64))
    assert [len(found.draws(size)) for size in (2, 64)] == [1, 1]
    assert calls == [2] * 5 + [64]
    assert found.report().shapes == {2: ("2×4",), 64: ("64×4",)}


def test_a_function_is_called_several_times_where_shapes_differ() -> None:
    lengths = iter(range(3, 99))
    found = requests(Mean(), of_lengths(lengths), (2, 64, 512, 1024))
    sizes = {size: found.draws(size) for size in (2, 64, 512, 1024)}
    assert {size: len(draws) for size, draws in sizes.items()} == {2: 5, 64: 5, 512: 2, 1024: 2}
    assert found.report().shapes[2] == ("2×3×3", "2×4×3", "2×5×3", "2×6×3", "2×7×3")
    assert found.report().why_draws == "several where there are enough samples, because shapes differ"


def test_a_large_first_size_shows_its_shapes_too() -> None:
    assert len(requests(Mean(), of_lengths(iter(range(3, 99))), (64,)).draws(64)) == 5
    assert len(requests(Mean(), of_lengths(iter([3] * 99)), (64,)).draws(64)) == 1
    assert len(requests(Mean(), of_lengths(iter([3] * 99)), (64,), num_draws=3).draws(64)) == 3


def test_random_batches_are_those_of_the_seed_and_leave_the_generators_alone() -> None:
    def draws() -> list[Tensor]:
        return requests(Mean(), lambda size: torch.randn(size, 4, 3), (2,), num_draws=2).draws(2)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = draws()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((first, second), draws(), strict=True))


def test_data_that_can_be_called_are_no_functions() -> None:
    class Graph:
        def __call__(self) -> None: ...
        def to(self, device: object) -> "Graph":
            return self

    assert not any(map(is_batch_fn, (torch.zeros(2), {"x": 1}, (1, 2), Graph(), nn.Linear(1, 1))))
    assert is_batch_fn(lambda size: None)


def fails(size: int) -> Tensor:
    if size > 1:
        raise KeyError("no collate")
    return torch.zeros(size, 4)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (fails, r"example_batch\(2\): expected a batch of 2 samples, got KeyError: 'no collate'\. Pass a function"),
        (lambda size: torch.zeros(7, 4), r"example_batch\(2\): expected a batch of 2 samples, got 7\. Return as many"),
    ],
)
def test_a_function_that_gives_no_batch_of_a_size_is_named_before_anything_is_timed(
    draw: Callable[[int], Tensor], message: str
) -> None:
    model, ran = nn.Linear(4, 2), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with untouched(model), pytest.raises(ValueError, match=message):
        inference_timing(model, draw, batch_sizes=[2, 4], **QUICK)
    assert not ran


def test_a_size_that_cannot_be_drawn_later_is_listed() -> None:
    timing = inference_timing(nn.Linear(4, 2), fails, batch_sizes=[1, 4], **QUICK)
    assert [row.batch_size for row in timing.rows] == [1]
    assert timing.skipped[0].reason.startswith("failed with ValueError: example_batch(4)")


def test_draws_of_one_size_are_in_the_result_the_summary_the_metrics_and_the_figure() -> None:
    seen = []
    model = Mean()
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    timing = inference_timing(model, of_lengths(iter(range(3, 99))), batch_sizes=[2], num_runs=7, warmup_runs=0)
    (row,) = timing.rows
    assert len(row.spread.medians) == 5
    # runs of each draw, and one pass of each to record it
    assert row.num_runs == 5 * 7
    assert {shape: seen.count(shape) >= 8 for shape in seen} == {(2, length, 3): True for length in range(3, 8)}
    assert row.flops == 0
    assert {"model/batch2/between_draws_ms", "model/batch2/within_draws_ms"} <= set(timing.metrics())
    summary = timing.summary()
    assert "| between draws | noise of a draw |" in summary
    assert "| 2 | 5 | 2×3×3; 2×4×3; 2×5×3; 2×6×3; 2×7×3 |" in summary
    _, ax = timing.plot()
    assert any(len(found.get_offsets()) == 5 for found in ax.collections)
    assert "dots: draws" in ax.get_title()
    assert json.loads(timing.to_json())["rows"][0]["spread"]["medians"] == list(row.spread.medians)


def test_heads_are_compared_over_all_draws() -> None:
    model = nn.Sequential(nn.Linear(4, 4), sparse())
    timing = inference_timing(model, torch.randn(12, 4), batch_sizes=[4], num_runs=6, warmup_runs=0)
    rows = {row.module: row for row in timing.rows}
    assert {len(row.spread.medians) for row in timing.rows} == {3}
    (point,) = timing.gaps[0].points
    assert point.realized == pytest.approx(rows["1_dense"].p50_ms / rows["1"].p50_ms)
    parts = [part for part in timing.parts if part.whole == "1"]
    assert sum(part.ms for part in parts) == pytest.approx(rows["1"].p50_ms)
