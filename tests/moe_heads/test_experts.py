"""Stacked experts."""

import pytest
import torch
from torch import nn

from moe_heads import Routing
from moe_heads.dispatch import mix, sum_all
from moe_heads.experts import Experts


def test_every_expert_starts_like_a_pair_of_linear_layers() -> None:
    experts = Experts(50, 64, 32, 10)
    linear = nn.Linear(64, 32)
    bound = linear.weight.abs().max()
    assert experts.fc1.weight.abs().max() <= 1 / 8
    torch.testing.assert_close(experts.fc1.weight.abs().max(), bound, rtol=0.02, atol=0)
    assert experts.fc2.weight.abs().max() <= 1 / 32**0.5
    assert experts.fc1.bias.std() > 0


def test_parameters_per_expert() -> None:
    assert Experts(3, 512, 64, 10).parameters_per_expert == 512 * 64 + 64 + 64 * 10 + 10


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    experts = Experts(2, 8, 4000, 1, dropout=0.5)
    with torch.no_grad():
        experts.fc2.bias.zero_()
    x, gates = torch.randn(1, 8), torch.tensor([[0.5, 0.5]])
    experts.eval()
    expected = sum_all(experts, x, gates)
    assert torch.equal(sum_all(experts, x, gates), expected)
    experts.train()
    samples = torch.stack([sum_all(experts, x, gates) for _ in range(200)])
    assert samples.std() > 0
    assert (samples.mean() - expected).abs() < 5 * samples.std() / 200**0.5


def test_selected_applies_dropout_in_training() -> None:
    experts = Experts(2, 8, 16, 3, dropout=0.5).train()
    x, logits = torch.randn(4, 8), torch.randn(4, 2)
    choice = {"indices": torch.zeros(4, 1, dtype=torch.int64), "weights": torch.ones(4, 1)}
    routing = Routing(logits=logits, probs=logits.softmax(-1), **choice)
    assert not torch.equal(mix(experts, x, routing, "ragged"), mix(experts, x, routing, "ragged"))


@pytest.mark.parametrize("name", ["num_experts", "in_features", "width", "out_features"])
def test_sizes_are_checked(name: str) -> None:
    sizes = {"num_experts": 2, "in_features": 3, "width": 4, "out_features": 5} | {name: 0}
    with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
        Experts(**sizes)
