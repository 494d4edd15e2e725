"""Switch router."""

import torch

from moe_heads.routers import SwitchRouter


def test_the_weight_is_the_probability_of_the_best_expert() -> None:
    router = SwitchRouter(4, 6).eval()
    x = torch.randn(10, 4)
    routing, probs = router(x), router.gate(x).softmax(-1)
    torch.testing.assert_close(routing.weights.squeeze(-1), probs.max(-1).values)
    assert torch.equal(routing.indices.squeeze(-1), probs.argmax(-1))
    assert routing.noisy_logits is None


def test_jitter_multiplies_the_input_within_its_bounds_in_training_only() -> None:
    router = SwitchRouter(1, 2, jitter=0.1).train()
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[1.0], [0.0]]))
        router.gate.bias.zero_()
    routing = router(torch.ones(5000, 1))
    factors = routing.noisy_logits[:, 0]
    assert factors.min() >= 0.9
    assert factors.max() <= 1.1
    # the mean of n uniform numbers of half width 0.1: five standard errors
    assert (factors.mean() - 1).abs() < 5 * 0.1 / 3**0.5 / 5000**0.5
    assert torch.equal(routing.logits, torch.ones(5000, 1) * torch.tensor([[1.0, 0.0]]))


def test_the_balance_loss_is_one_at_uniform_times_its_coefficient() -> None:
    router = SwitchRouter(3, 3, balance={"switch": 0.01}).eval()
    with torch.no_grad():
        router.gate.weight.copy_(1e-6 * torch.eye(3))
        router.gate.bias.zero_()
    torch.testing.assert_close(router(torch.eye(3)).aux_loss, torch.tensor(0.01))
