"""Statistics: known values, sums over batches and over ranks, margin, dropped rows."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from moe_heads import Routing, RoutingStats, SparseMoE
from tests.support.head_zoo import FEATURES, ROUTERS, head_with
from tests.support.processes import run_on_ranks


def test_counts_sum_to_k_times_rows() -> None:
    stats = SparseMoE(4, 2, num_experts=5, k=3)(torch.randn(7, 4), return_routing=True).routing.stats()
    assert stats.counts.sum() == 21
    assert stats.num_rows == 7
    torch.testing.assert_close(stats.gate_sum.sum().item(), 7.0)
    torch.testing.assert_close(stats.prob_sum.sum().item(), 7.0)
    assert stats.num_dropped == 0


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_statistics_add_up_over_uneven_batches(name: str) -> None:
    router = head_with(name).router
    x = torch.randn(10, FEATURES).double()
    whole = router(x).stats()
    parts = router(x[:3]).stats() + router(x[3:]).stats()
    for f in fields(RoutingStats):
        torch.testing.assert_close(getattr(parts, f.name), getattr(whole, f.name), rtol=1e-14, atol=0)
    assert torch.equal(parts.counts, whole.counts)


def test_statistics_of_fp32_rows_are_summed_in_float64() -> None:
    probs = torch.full((3000, 3), 1 / 3)
    stats = Routing(logits=probs, probs=probs).stats()
    assert stats.prob_sum.dtype == torch.float64
    assert stats.prob_sum[0].item() == 3000 * probs[0, 0].double().item()


def test_known_values() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    stats = Routing(logits=probs, probs=probs).stats()
    assert stats.counts.tolist() == [2, 0, 0]
    assert stats.load.tolist() == [1, 0, 0]
    torch.testing.assert_close(stats.importance, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    torch.testing.assert_close(stats.mean_probs, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    torch.testing.assert_close(stats.entropy.item(), math.log(2) / 2)
    torch.testing.assert_close(stats.margin.item(), 0.5)
    assert stats.dropped == 0
    assert all(not getattr(stats, f.name).requires_grad for f in fields(stats))


def test_margin_is_the_distance_between_the_last_chosen_and_the_next() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5, -1.0]])
    for k, margin in ((1, 0.5), (2, 1.5), (3, 2.0), (4, math.inf)):
        indices = logits.topk(k).indices
        routing = Routing(logits=logits, probs=logits.softmax(-1), indices=indices, weights=torch.ones(1, k))
        torch.testing.assert_close(routing.margin, torch.tensor([margin]))
        assert routing.stats().margin == margin


def test_a_change_below_the_margin_flips_no_row_and_one_above_it_does() -> None:
    router = head_with("noisy_top_k").router
    x = torch.randn(20, FEATURES).double()
    routing = router(x)
    for factor, flips in ((0.49, False), (0.51, True)):
        # the last chosen down and the next up, by about half of the margin each
        order = routing.logits.argsort(-1, descending=True)
        change = torch.zeros_like(routing.logits)
        change.scatter_(-1, order[:, 1:2], -factor * routing.margin.unsqueeze(-1))
        change.scatter_(-1, order[:, 2:3], factor * routing.margin.unsqueeze(-1))
        chosen = (routing.logits + change).topk(2).indices.sort(-1).values
        assert torch.equal(chosen, routing.indices.sort(-1).values) != flips


def test_no_value_is_read_by_the_host() -> None:
    x = torch.randn(6, FEATURES, device="meta")
    for name in ROUTERS:
        stats = head_with(name, torch.float32).to("meta").router(x).stats()
        assert (stats + stats).counts.shape == (4,)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [None, 1, 2])
def test_sums_are_those_of_the_valid_rows(k: int | None, bad: float | None) -> None:
    logits = torch.randn(9, 4)
    if bad is not None:
        logits[2, 1] = bad
    indices = None if k is None else logits.topk(k).indices
    weights = None if indices is None else logits.softmax(-1).gather(-1, indices)
    routing = Routing(logits=logits, probs=logits.softmax(-1), indices=indices, weights=weights)
    stats, rows = routing.stats(), [row for row in range(9) if bad is None or row != 2]
    assert routing.valid.nonzero().flatten().tolist() == rows
    assert torch.equal(stats.counts, routing.selected[rows].sum(0))
    torch.testing.assert_close(stats.gate_sum, routing.gates[rows].double().sum(0))
    torch.testing.assert_close(stats.prob_sum, routing.probs[rows].double().sum(0))
    torch.testing.assert_close(stats.margin_sum, routing.margin[rows].double().sum())
    assert (stats.num_rows, stats.num_nonfinite, stats.num_dropped) == (len(rows), 9 - len(rows), 0)


def test_finite_logits_with_an_infinite_sum_are_valid() -> None:
    logits = torch.full((3, 4), torch.finfo(torch.float32).max)
    routing = Routing(logits=logits, probs=torch.full((3, 4), 0.25))
    assert routing.valid.all() and routing.stats().num_rows == 3


def of_rank(rank: int) -> RoutingStats:
    torch.manual_seed(0)
    router = head_with("noisy_top_k").router
    x = torch.randn(10, FEATURES).double()
    return router(x[:3] if rank == 0 else x[3:]).stats().all_reduce()


def test_sums_over_uneven_ranks(tmp_path: Path) -> None:
    results = run_on_ranks(of_rank, tmp_path)
    torch.manual_seed(0)
    router = head_with("noisy_top_k").router
    expected = router(torch.randn(10, FEATURES).double()).stats()
    for stats in results:
        assert torch.equal(stats.counts, expected.counts)
        for f in fields(RoutingStats):
            assert getattr(stats, f.name).dtype == getattr(expected, f.name).dtype
            torch.testing.assert_close(getattr(stats, f.name), getattr(expected, f.name), rtol=1e-14, atol=0)


def test_without_ranks_the_sums_are_the_statistics_themselves() -> None:
    stats = head_with("switch").router(torch.randn(3, FEATURES).double()).stats()
    assert stats.all_reduce() is stats
