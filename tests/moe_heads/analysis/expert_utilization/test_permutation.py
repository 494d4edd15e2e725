import pytest
import torch
from torch import Tensor
from torchmetrics.clustering import MutualInfoScore

from moe_heads.analysis.expert_utilization.permutation import permutation_baseline


def one_hot(experts: Tensor, num_experts: int = 4) -> Tensor:
    return torch.nn.functional.one_hot(experts, num_experts)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # inside torchmetrics
def test_the_mean_is_that_of_another_librarys_score_under_permutations() -> None:
    torch.manual_seed(0)
    labels, experts = torch.randint(3, (150,)), torch.randint(4, (150,))
    found = permutation_baseline(labels, one_hot(experts), 3, 2000, seed=1)
    scores = torch.stack([MutualInfoScore()(labels[torch.randperm(150)], experts) for _ in range(300)]).double()
    # the mean of 2,000 has a seventh of the variance of that of 300
    assert abs(found.mean - float(scores.mean())) < 4 * float(scores.std()) / 300**0.5


def test_p_values_of_independent_labels_are_uniform() -> None:
    torch.manual_seed(0)
    values = torch.tensor([
        permutation_baseline(torch.randint(3, (60,)), one_hot(torch.randint(4, (60,))), 3, 39, seed=s).p_value
        for s in range(200)
    ])
    for level in (0.1, 0.25, 0.5, 0.75):
        share = float((values <= level).float().mean())
        assert abs(share - level) < 4 * (level * (1 - level) / 200) ** 0.5 + 0.01


def test_specialists_are_found_and_the_order_of_samples_does_not_matter() -> None:
    labels = torch.arange(4).repeat(10)
    order = torch.randperm(40)
    found = permutation_baseline(labels, one_hot(labels), 4, 99, seed=0)
    assert found == permutation_baseline(labels[order], one_hot(labels)[order], 4, 99, seed=0)
    assert found.p_value == pytest.approx(0.01)


def test_the_tokens_of_a_sample_are_permuted_together() -> None:
    """A thousand equal tokens of each of six samples are no more evidence than six samples."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = permutation_baseline(labels, 1000 * one_hot(labels), 2, 999, seed=0)
    assert found.p_value == pytest.approx(2 / 20, abs=0.03)
