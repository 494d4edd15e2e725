"""Collection of the decisions of the routers of any model."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_heads import Dense, SoftMoE, SparseMoE, collect_routing
from moe_heads.routers import SoftmaxRouter


def two_heads() -> nn.ModuleDict:
    return nn.ModuleDict({"soft": SoftMoE(4, 2, num_experts=3), "sparse": SparseMoE(4, 2, num_experts=4)})


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
    assert {name: len(stats.counts) for name, stats in routing.stats.items()} == {"0.coarse": 2, "0.fine": 5}


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
    head = SparseMoE(4, 2, num_experts=4, k=1, noisy=True, balance={"load": 1.0}).eval()
    routing = head(torch.randn(9, 4), return_routing=True).routing
    counts = routing.stats().counts.double()
    expected = counts.var(correction=0) / counts.mean() ** 2
    torch.testing.assert_close(routing.aux_loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_was_compiled_before_is_told() -> None:
    head = SparseMoE(4, 2, num_experts=4).eval()
    compiled = torch.compile(head, backend="eager")
    x = torch.randn(6, 4)
    compiled(x)
    with collect_routing(compiled) as routing:
        compiled(x)
    for read in (lambda: routing.stats, lambda: routing.aux_loss):
        with pytest.warns(
            UserWarning, match="expected a forward pass of the routers .* got none. If the model was compiled"
        ):
            read()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_a_pass_once(use_reentrant: bool) -> None:
    head = SparseMoE(4, 2, num_experts=4)
    x = torch.randn(6, 4, requires_grad=True)
    with collect_routing(head) as routing:
        checkpoint(head, x, use_reentrant=use_reentrant).sum().backward()
    assert routing.stats["head"].num_rows == 6


def test_balance_loss_collected_through_a_checkpoint_has_its_gradient() -> None:
    head = SparseMoE(4, 2, num_experts=4, noisy=False, dropout=0.0, balance={"importance": 1.0})
    x = torch.randn(6, 4)
    gradients = []
    for run in (head, lambda x: checkpoint(head, x, use_reentrant=False)):
        head.zero_grad()
        with collect_routing(head) as routing:
            logits = run(x)
        (logits.sum() + routing.aux_loss).backward()
        gradients.append(head.router.gate.weight.grad)
    torch.testing.assert_close(*gradients)
