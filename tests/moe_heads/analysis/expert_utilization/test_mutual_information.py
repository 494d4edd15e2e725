"""Mutual information against an independent library, and its permutation test."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor
from torchmetrics.clustering import MutualInfoScore

from moe_heads.analysis.expert_utilization.mutual_information import (
    information_of_groups,
    information_of_samples,
    mutual_information,
    permutation_baseline,
)


def test_plug_in_estimate_equals_scikit_learns() -> None:
    table = torch.randint(0, 9, (4, 6))
    assert mutual_information(table).plugin == pytest.approx(mutual_info_score(None, None, contingency=table.numpy()))


@pytest.mark.parametrize("num_classes", [2, 10])
def test_perfect_specialists_have_log_c(num_classes: int) -> None:
    estimate = mutual_information(50 * torch.eye(num_classes, dtype=torch.int64))
    assert estimate.plugin == pytest.approx(math.log(num_classes))
    # m_X + m_Y - m_XY - 1 = C - 1
    assert estimate.corrected == pytest.approx(math.log(num_classes) + (num_classes - 1) / (100 * num_classes))


def test_independent_variables_have_none() -> None:
    rows, columns = torch.tensor([1, 2, 3]), torch.tensor([4, 1])
    estimate = mutual_information(rows[:, None] * columns)
    assert estimate.plugin == pytest.approx(0, abs=1e-12)
    assert estimate.stderr == pytest.approx(0, abs=1e-12)


def test_correction_removes_the_bias() -> None:
    """200 tables of 100 independent draws: the plug-in mean is 12 / 2N too large, the corrected one is not."""
    estimates = []
    for _ in range(200):
        table = torch.zeros(4, 5, dtype=torch.int64)
        table.index_put_(
            (torch.randint(4, (100,)), torch.randint(5, (100,))), torch.ones(100, dtype=torch.int64), accumulate=True
        )
        estimates.append(mutual_information(table))
    plugin = torch.tensor([e.plugin for e in estimates])
    corrected = torch.tensor([e.corrected for e in estimates])
    stderr = (corrected.std() / len(estimates) ** 0.5).item()
    assert plugin.mean().item() == pytest.approx(12 / 200, abs=5 * stderr)
    assert corrected.mean().item() == pytest.approx(0, abs=5 * stderr)


@pytest.mark.parametrize("kind", ["two different experts", "like tokens"])
def test_correction_and_stderr_where_the_choices_of_a_sample_depend_on_one_another(kind: str) -> None:
    """300 data sets of 150 samples whose labels are independent of the experts."""
    estimates, plain = [], []
    for _ in range(300):
        labels = torch.randint(4, (150,))
        if kind == "like tokens":  # of six, each is that of its sample or, one in three, any
            of_sample, of_token = torch.randint(5, (150, 1)), torch.randint(5, (150, 6))
            experts = torch.where(torch.rand(150, 6) < 1 / 3, of_token, of_sample)
        else:
            experts = torch.rand(150, 5).topk(2).indices
        chosen = torch.nn.functional.one_hot(experts, 5).sum(1)
        estimates.append(information_of_samples(labels, chosen, 4).corrected)
        plain.append(mutual_information(torch.zeros(4, 5).index_add_(0, labels, chosen.float())).corrected)
    corrected = torch.tensor(estimates)
    stderr = float(corrected.std()) / 300**0.5
    assert abs(float(corrected.mean())) < 4 * stderr
    assert abs(float(torch.tensor(plain).mean())) > 8 * stderr  # what every choice alone would give


def test_stderr_over_samples_is_the_spread_over_repetitions() -> None:
    estimates = []
    for _ in range(400):
        labels = torch.randint(2, (250,))
        liked = torch.where(torch.rand(250) < 0.8, labels, 1 - labels)  # of the sample, and all of its tokens mostly
        experts = torch.where(torch.rand(250, 4) < 0.7, liked.unsqueeze(1), 2)
        chosen = torch.nn.functional.one_hot(experts, 3).sum(1)
        estimates.append(information_of_samples(labels, chosen, 2))
    spread = float(torch.tensor([e.plugin for e in estimates]).std())
    assert float(torch.tensor([e.stderr for e in estimates]).mean()) == pytest.approx(spread, rel=0.15)


def test_one_choice_a_sample_is_the_table() -> None:
    labels, experts = torch.randint(3, (80,)), torch.randint(4, (80,))
    chosen = torch.nn.functional.one_hot(experts, 4)
    table = torch.zeros(3, 4).index_add_(0, labels, chosen.float())
    found, expected = information_of_samples(labels, chosen, 3), mutual_information(table)
    assert vars(found) == pytest.approx(vars(expected))


def test_stderr_is_the_spread_over_repetitions() -> None:
    joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    draws = torch.multinomial(joint.flatten().expand(400, 4), 500, replacement=True)
    tables = torch.nn.functional.one_hot(draws, 4).sum(1).view(400, 2, 2)
    estimates = [mutual_information(table) for table in tables]
    spread = torch.tensor([e.corrected for e in estimates]).std().item()
    # the standard deviation of 400 draws is known to 3.5 %
    assert estimates[0].stderr == pytest.approx(spread, rel=0.2)


def test_doubling_the_data_keeps_the_plug_in_and_halves_the_correction() -> None:
    table = torch.randint(1, 9, (3, 4))
    once, twice = mutual_information(table), mutual_information(2 * table)
    assert twice.plugin == pytest.approx(once.plugin)
    assert twice.corrected - twice.plugin == pytest.approx((once.corrected - once.plugin) / 2)
    assert twice.stderr == pytest.approx(once.stderr / 2**0.5)


def test_an_empty_table() -> None:
    estimate = mutual_information(torch.zeros(2, 3))
    assert (estimate.plugin, estimate.corrected, estimate.stderr) == (0, 0, 0)


@pytest.mark.parametrize("counts", [torch.ones(3), torch.tensor([[1, -1]])])
def test_bad_counts(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="counts: expected a matrix of counts of at least 0, got"):
        mutual_information(counts)


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


def grouped(labels: torch.Tensor, experts: torch.Tensor, num_groups: int, shape: tuple[int, int]) -> torch.Tensor:
    """Counts (G, C, E) of samples (B, T) in random groups."""
    counts = torch.zeros(num_groups, *shape, dtype=torch.int64)
    groups = torch.randint(num_groups, (len(labels),)).unsqueeze(1).expand_as(labels)
    return counts.index_put_((groups, labels, experts), torch.tensor(1), accumulate=True)


def test_jackknife_is_that_of_a_loop() -> None:
    counts = grouped(torch.randint(3, (50, 4)), torch.randint(5, (50, 4)), 10, (3, 5))
    found, total = information_of_groups(counts), counts.sum()
    plugin = mutual_information(counts.sum(0)).plugin
    pseudo, corrected = [], 10 * plugin
    for group in counts:
        without, h = mutual_information(counts.sum(0) - group).plugin, float(total / group.sum())
        corrected -= (1 - 1 / h) * without
        pseudo.append((h, h * plugin - (h - 1) * without))
    variance = sum((value - corrected) ** 2 / (h - 1) for h, value in pseudo) / 10
    assert found.plugin == plugin
    assert found.corrected == pytest.approx(corrected)
    assert found.stderr == pytest.approx(variance**0.5)


def tokens_of_samples(dependence: float, agreement: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and experts (B, T), of which a fraction is equal within a sample, and equal to each other."""

    def draw(number: int) -> torch.Tensor:
        own, first = torch.randint(number, (300, 8)), torch.randint(number, (300, 1))
        return torch.where(torch.rand(300, 8) < dependence, first, own)

    labels = draw(3)
    return labels, torch.where(torch.rand(300, 8) < agreement, labels, draw(4))


@pytest.mark.parametrize("dependence", [0.0, 0.9])
def test_jackknife_where_the_tokens_of_a_sample_depend_on_one_another(dependence: float) -> None:
    """The bias and the spread grow with the dependence, as for fewer tokens."""
    joint = 0.2 * torch.eye(3, 4, dtype=torch.float64) / 3 + 0.8 * torch.full((3, 4), 1 / 12, dtype=torch.float64)
    information = float((joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()).sum())
    for agreement, truth in ((0.0, 0.0), (0.2, information)):
        drawn = (tokens_of_samples(dependence, agreement) for _ in range(100))
        found = [information_of_groups(grouped(*each, 64, (3, 4))) for each in drawn]
        plugin, corrected, stderr = (
            torch.tensor([getattr(each, name) for each in found]) for name in ("plugin", "corrected", "stderr")
        )
        error = float(corrected.std()) / 100**0.5
        assert float(corrected.mean()) == pytest.approx(truth, abs=4 * error)
        if not agreement:
            assert float(plugin.mean()) > 8 * error
            assert float(plugin.mean()) == pytest.approx((1 + 7 * dependence**4) * 6 / (2 * 2400), rel=0.3)
        else:
            assert float(stderr.mean()) == pytest.approx(float(corrected.std()), rel=0.25)


def test_too_few_groups_raise_an_error() -> None:
    with pytest.raises(ValueError, match="counts: expected at least 8 groups with choices, got 3"):
        information_of_groups(torch.ones(3, 2, 2, dtype=torch.int64))
