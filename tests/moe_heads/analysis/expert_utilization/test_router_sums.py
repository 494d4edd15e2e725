"""Sums of routers over windows and ranks, against a sum over all rows."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.training import RouterReport, TrainingRouters
from moe_heads.routing import RoutingStats, collect_routing, map_packed
from tests.support.processes import NUM_RANKS, run_on_ranks


class TwoHeads(nn.Module):
    """Uses its second head for batches of at least three rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = SparseMoE(4, 3, num_experts=4, expert_width=2)
        self.b = SparseMoE(4, 3, num_experts=2, expert_width=2, k=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + (self.b(x) if len(x) > 2 else 0)


def reported(
    batches: list[list[Tensor]], ranks: Ranks
) -> tuple[list[dict[str, RouterReport]], dict[str, RouterReport]]:
    """Reports of windows of batches, and of the epoch."""
    model = TwoHeads()
    with collect_routing(model) as collection:
        routers = TrainingRouters(model, collection, None, 0.01, 0.25)
        windows = []
        for window in batches:
            for x in window:
                routers.begin_batch()
                model(x)
                routers.end_training_batch()
            windows.append(routers.end_window(ranks))
        return windows, routers.end_epoch(ranks)


def directly(batches: list[list[Tensor]]) -> dict[str, RoutingStats]:
    model = TwoHeads()
    with collect_routing(model) as collection:
        for x in chain.from_iterable(batches):
            model(x)
    return collection.stats if any(batches) else {}


def assert_equal(found: RoutingStats, expected: RoutingStats) -> None:
    for name, value in vars(expected).items():
        exact = not value.is_floating_point()
        torch.testing.assert_close(getattr(found, name), value, rtol=0 if exact else 1e-6, atol=0)


sizes = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4)


@settings(deadline=None)
@given(sizes)
def test_windows_add_up_to_the_epoch_of_all_rows(sizes: list[list[int]]) -> None:
    torch.manual_seed(1)
    batches = [[torch.randn(size, 4) for size in window] for window in sizes]
    windows, epoch = reported(batches, Ranks())
    expected = directly(batches)
    assert set(epoch) == set(expected)
    for name, report in epoch.items():
        own = [window[name].stats for window in windows if name in window]
        assert len(own) == sum(any(size > 2 for size in window) if name == "b" else bool(window) for window in sizes)
        assert_equal(sum(own[1:], start=own[0]), report.stats)
        assert_equal(report.stats, expected[name])


def test_a_single_window_has_the_numbers_of_the_epoch() -> None:
    batches = [[torch.randn(size, 4) for size in (5, 2, 4)]]
    (window,), epoch = reported(batches, Ranks())
    of_weights = {"num_inert_experts", "weight_norm_min", "stable_rank_min"}  # measured once in an epoch
    for name, report in window.items():
        of_epoch = epoch[name].scalars
        assert report.scalars == {key: value for key, value in of_epoch.items() if key not in of_weights}
    assert not any(report.warnings for report in window.values())


def test_a_pass_without_a_batch_start_or_between_batches_is_not_counted() -> None:
    model = TwoHeads()
    with collect_routing(model) as collection:
        routers = TrainingRouters(model, collection, None, 0.01, 0.25)
        routers.begin_batch()
        model(torch.randn(5, 4))
        assert routers.end_window(Ranks()).keys() == set()  # the batch has not ended
        model(torch.randn(5, 4))
        routers.end_training_batch()
        assert int(routers.end_window(Ranks())["a"].stats.num_rows) == 5


UNEVEN: list[list[list[int]]] = [[[3, 1], [], [1], []], [[], [2], [1, 4], []]]
"""Sizes of the batches of each window, by rank."""


def on_rank(rank: int) -> Any:
    torch.manual_seed(rank)
    batches = [[torch.randn(size, 4) for size in window] for window in UNEVEN[rank]]
    windows, epoch = reported(batches, Ranks(torch.distributed.group.WORLD))
    return directly(batches), [{n: (r.stats, r.scalars) for n, r in window.items()} for window in (*windows, epoch)]


@pytest.mark.slow
def test_ranks_without_a_pass_report_the_sums_of_all(tmp_path: Path) -> None:
    found = run_on_ranks(on_rank, tmp_path)
    assert len(UNEVEN) == NUM_RANKS
    (of_first, reports), (of_second, others) = found
    assert [set(report) for report in reports] == [{"a", "b"}, {"a"}, {"a", "b"}, set(), {"a", "b"}]
    for report, other in zip(reports, others, strict=True):
        assert {name: scalars for name, (_, scalars) in report.items()} == {n: s for n, (_, s) in other.items()}
    for name, (stats, _) in reports[-1].items():
        assert_equal(stats, of_first[name] + of_second[name])


def test_map_packed_calls_a_function_for_two_vectors() -> None:
    tensors = [torch.tensor(1), torch.tensor([[2.0, 3.0]]), torch.tensor([4, 5]), torch.tensor(6.0)]
    seen: list[list[float]] = []

    def double(vector: Tensor) -> Tensor:
        seen.append(vector.tolist())
        return 2 * vector

    found = map_packed(tensors, double)
    assert seen == [[1, 4, 5], [2.0, 3.0, 6.0]]
    for before, after in zip(tensors, found, strict=True):
        assert torch.equal(after, 2 * before) and after.dtype == before.dtype
    assert map_packed([], pytest.fail) == []
