"""Balance losses against hand-made cases and Monte Carlo."""

import math

import pytest
import torch

from moe_heads import balance

ALL = torch.ones(8, dtype=torch.bool)


def one_expert_for_all(num_experts: int = 4) -> torch.Tensor:
    gates = torch.zeros(8, num_experts)
    gates[:, 0] = 1
    return gates


def uniform(num_experts: int = 4) -> torch.Tensor:
    return torch.full((8, num_experts), 1 / num_experts)


def test_importance_is_zero_when_even_and_e_minus_one_when_collapsed() -> None:
    assert balance.importance_loss(uniform(), ALL) == 0
    torch.testing.assert_close(balance.importance_loss(one_expert_for_all(), ALL), torch.tensor(3.0))


def test_importance_is_the_population_cv_squared() -> None:
    gates = torch.rand(8, 4)
    sums = gates.sum(0).numpy()
    assert balance.importance_loss(gates, ALL).item() == pytest.approx(sums.var() / sums.mean() ** 2, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_selection_probability_equals_the_frequency_under_redrawn_noise(k: int) -> None:
    z, std = torch.randn(5), torch.rand(5) + 0.2
    noise = torch.randn(5)
    probability = balance.selection_probability(z[None], (z + noise * std)[None], std[None], k)[0]
    draws = 40_000
    for expert in range(5):
        noisy = (z + noise * std).repeat(draws, 1)
        noisy[:, expert] = z[expert] + torch.randn(draws) * std[expert]
        frequency = (noisy.topk(k).indices == expert).any(-1).double().mean().item()
        p = probability[expert].item()
        assert abs(frequency - p) < 5 * math.sqrt(max(p * (1 - p), 1e-4) / draws)


def test_everybody_is_selected_when_k_is_all() -> None:
    z = torch.randn(8, 4)
    assert torch.equal(balance.selection_probability(z, z, torch.ones_like(z), 4), torch.ones_like(z))
    assert balance.load_loss(z, z, torch.ones_like(z), 4, ALL) == 0


def test_load_is_not_the_importance_again() -> None:
    # one expert is chosen a little more often but with all the weight: importance and load must differ
    z = torch.tensor([[5.0, 4.9, 0.0, 0.0]]).repeat(8, 1)
    std = torch.full_like(z, 0.5)
    load = balance.load_loss(z, z, std, 1, ALL)
    importance = balance.importance_loss(torch.nn.functional.one_hot(z.argmax(-1), 4).float(), ALL)
    assert load < 0.5 * importance


def test_load_has_a_gradient_to_logits_and_noise() -> None:
    z, std = torch.randn(8, 4, requires_grad=True), (torch.rand(8, 4) + 0.1).requires_grad_()
    balance.load_loss(z, z + torch.randn(8, 4) * std, std, 2, ALL).backward()
    assert z.grad.abs().sum() > 0
    assert std.grad.abs().sum() > 0


def test_load_survives_vanishing_noise() -> None:
    z = torch.zeros(8, 4, requires_grad=True)
    loss = balance.load_loss(z, z, torch.zeros(8, 4), 2, ALL)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_switch_is_one_when_uniform_and_e_when_collapsed() -> None:
    counts = torch.zeros(8, 4, dtype=torch.int64).scatter(1, torch.arange(8)[:, None] % 4, 1)
    torch.testing.assert_close(balance.switch_loss(uniform(), counts, ALL), torch.tensor(1.0))
    collapsed = one_expert_for_all()
    torch.testing.assert_close(balance.switch_loss(collapsed, collapsed.long(), ALL), torch.tensor(4.0))


def test_z_loss_formula() -> None:
    z = torch.randn(8, 4)
    expected = z.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(balance.z_loss(z, ALL), expected)


def test_kl_is_mean_to_uniform_in_nats() -> None:
    assert balance.kl_uniform_loss(uniform(), ALL).abs() < 1e-6
    torch.testing.assert_close(balance.kl_uniform_loss(one_expert_for_all(), ALL), torch.tensor(math.log(4)))
    gates = torch.tensor([[0.7, 0.2, 0.1]])
    expected = sum(p * math.log(p * 3) for p in (0.7, 0.2, 0.1))
    assert balance.kl_uniform_loss(gates, ALL[:1]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_that_do_not_count_change_nothing(rows: int) -> None:
    z = torch.randn(8, 4)
    poisoned = torch.cat([z, torch.full((rows, 4), float("nan"))])
    valid = poisoned.isfinite().all(-1)
    counts = torch.zeros(len(poisoned), 4, dtype=torch.int64).scatter(1, poisoned.topk(2).indices, 1)
    for got, want in (
        (balance.importance_loss(poisoned.softmax(-1), valid), balance.importance_loss(z.softmax(-1), ALL)),
        (balance.z_loss(poisoned, valid), balance.z_loss(z, ALL)),
        (balance.kl_uniform_loss(poisoned.softmax(-1), valid), balance.kl_uniform_loss(z.softmax(-1), ALL)),
        (
            balance.switch_loss(poisoned.softmax(-1), counts, valid),
            balance.switch_loss(z.softmax(-1), counts[:8], ALL),
        ),
        (
            balance.load_loss(poisoned, poisoned, torch.ones_like(poisoned), 2, valid),
            balance.load_loss(z, z, torch.ones_like(z), 2, ALL),
        ),
    ):
        torch.testing.assert_close(got, want)


def test_empty_batch_has_no_imbalance() -> None:
    empty, valid = torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)
    for loss in (balance.importance_loss, balance.z_loss, balance.kl_uniform_loss):
        assert loss(empty, valid) == 0
