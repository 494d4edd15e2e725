"""Routing, its statistics, and their collection from any model."""

import math

import pytest
import torch
from torch import nn

from moe_heads import Dense, Routing, SoftMoE, SparseMoE, collect_routing
from moe_heads.routers import SoftmaxRouter


def two_heads() -> nn.ModuleDict:
    return nn.ModuleDict({"soft": SoftMoE(4, 2, num_experts=3), "sparse": SparseMoE(4, 2, num_experts=4)})


def test_counts_sum_to_k_times_rows() -> None:
    stats = SparseMoE(4, 2, num_experts=5, k=3)(torch.randn(7, 4), return_routing=True).routing.stats()
    assert stats.counts.sum() == 21
    assert stats.num_rows == 7
    torch.testing.assert_close(stats.gate_sum.sum().item(), 7.0)


def test_statistics_add_up_exactly_over_batches() -> None:
    head = SparseMoE(4, 2, num_experts=5).double().eval()
    x = torch.randn(10, 4).double()
    whole = head(x, return_routing=True).routing.stats()
    parts = head(x[:3], return_routing=True).routing.stats() + head(x[3:], return_routing=True).routing.stats()
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.gate_sum, whole.gate_sum)
    torch.testing.assert_close(parts.entropy, whole.entropy)


def test_statistics_are_detached_and_hold_known_values() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    stats = Routing(logits=probs, probs=probs).stats()
    assert stats.counts.tolist() == [2, 0, 0]
    assert stats.load.tolist() == [1, 0, 0]
    torch.testing.assert_close(stats.importance, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    torch.testing.assert_close(stats.entropy.item(), math.log(2) / 2)
    assert not stats.gate_sum.requires_grad


def test_collects_every_head_by_name_at_any_depth() -> None:
    model = nn.ModuleDict({"branch": two_heads(), "plain": Dense(4, 2)})
    x = torch.randn(5, 4)
    with collect_routing(model) as routing:
        outputs = [model["branch"][name](x) for name in ("soft", "sparse")]
    assert set(routing.stats) == {"branch.soft", "branch.sparse"}
    assert routing.stats["branch.soft"].counts.sum() == 5
    assert all(torch.is_tensor(output) for output in outputs)


def test_collection_of_a_head_itself_equals_return_routing() -> None:
    head = SoftMoE(4, 2).eval()
    x = torch.randn(5, 4)
    with collect_routing(head) as routing:
        output = head(x, return_routing=True)
    assert list(routing.routings) == ["head"]
    assert torch.equal(routing.aux_loss, output.aux_loss)


def test_two_routers_of_one_module_are_kept_apart() -> None:
    class TwoRouters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse, self.fine = SoftmaxRouter(4, 2), SoftmaxRouter(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.coarse(x).probs.sum() + self.fine(x).probs.sum()

    model = nn.Sequential(TwoRouters())
    with collect_routing(model) as routing:
        model(torch.randn(3, 4))
    assert {name: len(stats.counts) for name, stats in routing.stats.items()} == {"0": 2, "0.fine": 5}


def test_aux_loss_sums_over_heads_and_passes() -> None:
    model = two_heads().eval()
    x = torch.randn(5, 4)
    with collect_routing(model) as routing:
        for _ in range(2):
            for head in model.values():
                head(x)
    expected = 2 * sum(head(x, return_routing=True).aux_loss for head in model.values())
    torch.testing.assert_close(routing.aux_loss, expected)


def test_model_without_a_router_has_no_aux_loss() -> None:
    model = nn.Linear(4, 2)
    with collect_routing(model) as routing:
        model(torch.randn(3, 4))
    assert routing.aux_loss == 0
    assert routing.stats == {}


def test_nothing_stays_on_the_model_after_the_block_or_an_error() -> None:
    model = two_heads()
    with pytest.raises(RuntimeError, match="stop"), collect_routing(model):
        model["soft"](torch.randn(2, 4))
        raise RuntimeError("stop")
    assert all(not module._forward_hooks for module in model.modules())


def test_nested_collections_both_see_the_pass() -> None:
    head = SoftMoE(4, 2)
    with collect_routing(head) as outer, collect_routing(head) as inner:
        head(torch.randn(2, 4))
    assert outer.stats["head"].num_rows == inner.stats["head"].num_rows == 2


def test_load_term_in_evaluation_is_the_cv_of_the_counts() -> None:
    head = SparseMoE(4, 2, num_experts=4, k=1, balance={"load": 1.0}).eval()
    routing = head(torch.randn(9, 4), return_routing=True).routing
    counts = routing.stats().counts.double()
    expected = counts.var(correction=0) / counts.mean() ** 2
    torch.testing.assert_close(routing.aux_loss.double(), expected, rtol=1e-5, atol=1e-6)
