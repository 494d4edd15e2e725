"""A head against its randomly permuted self."""

import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis.weight_matching.barrier import line_loss
from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.tensors import tensors_of
from moe_heads.lightning_modules.backbones import CifarResNet
from moe_heads.routing import Router, Routing
from tests.support.matching import cross_entropy, heads, permute_randomly, scatter


@pytest.mark.parametrize("name", heads(6))
@pytest.mark.parametrize("has_tokens", [False, True])
def test_a_permuted_head_is_found_again(name: str, has_tokens: bool) -> None:
    model = scatter(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), heads(6)[name]()))
    if name == "layer":
        has_tokens = False
    x = torch.randn(20, 4, 5) if has_tokens else torch.randn(20, 5)
    batch = x, model(x).argmax(-1)  # a network that fits its labels, as after training
    permuted = permute_randomly(model, cross_entropy, batch, seed=3)
    match = match_weights(model, permuted, cross_entropy, batch)
    assert not match.failed and not match.unmatched
    assert {"units", *(["experts"] if name != "dense" else [])} <= set(match.moved)
    assert ("slots" in match.moved) == (name == "soft with slots")
    before = line_loss(model, permuted, cross_entropy, [batch])
    after = line_loss(model, match.tensors, cross_entropy, [batch])
    assert before.barrier > 1e-3
    assert after.barrier <= 1e-6 * after.losses[0]
    assert before.losses[-1] == pytest.approx(before.losses[0], rel=1e-5)  # the permuted network is the same function
    assert all(torch.equal(match.tensors[key], tensor) for key, tensor in tensors_of(model).items())


@pytest.mark.parametrize("name", heads(32))
def test_a_permuted_resnet_is_found_again(name: str) -> None:
    """With zero-padded shortcuts: the new channels of a stage trade places among themselves only."""
    model = scatter(nn.Sequential(CifarResNet(8, width=8), heads(32)[name]()))
    batch = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    permuted = permute_randomly(model, cross_entropy, batch, seed=1)
    match = match_weights(model, permuted, cross_entropy, batch, num_restarts=0)
    assert not match.failed and not match.unmatched
    # stem and first stage 8 + 8, second 8 new + 16 inner, third 16 new + 32 inner
    assert match.moved["units"][1] == 88 + {"dense": 7, "layer": 5}.get(name, 0)
    assert match.distance_before > 1 and match.distance_after == 0


class FirstExperts(Router):
    """A custom router whose tensors are unknown: every row goes to the first two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.k, self.in_features = 3, 2, 6
        self.mixing = nn.Parameter(torch.randn(6, 2))

    def forward(self, x, rows_per_sample=1, mask=None):
        weights = (x @ self.mixing).softmax(-1)
        logits = torch.zeros(len(x), 3)
        return Routing(
            logits=logits, probs=logits.softmax(-1), indices=torch.tensor([0, 1]).expand(len(x), 2), weights=weights
        )


def test_experts_of_an_unknown_router_keep_their_order() -> None:
    head = SparseMoE(6, 3, num_experts=3, expert_width=4, router=FirstExperts(), num_shared_experts=0)
    model = scatter(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), head))
    batch = torch.randn(20, 5), torch.randint(3, (20,))
    match = match_weights(model, permute_randomly(model, cross_entropy, batch), cross_entropy, batch)
    assert not match.failed and match.distance_after == 0
    assert set(match.moved) == {"hidden units"}
    assert set(match.unmatched) == {"0.weight", "2.router.mixing"}
