"""Noisy top-k router: selection by index, weights, noise."""

import pytest
import torch

from moe_heads.routers import NoisyTopKRouter, SoftmaxRouter, linear_fp32


def test_ties_never_select_more_than_k() -> None:
    router = NoisyTopKRouter(4, 6, k=2).eval()
    torch.nn.init.zeros_(router.gate.weight)
    torch.nn.init.zeros_(router.gate.bias)
    routing = router(torch.randn(10, 4))
    assert (routing.gates > 0).sum(-1).tolist() == [2] * 10
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(10))


def test_weights_are_the_softmax_of_the_chosen_logits() -> None:
    router = NoisyTopKRouter(4, 6, k=3, temperature=2.0).eval()
    x = torch.randn(10, 4)
    routing = router(x)
    z = router.gate(x) / 2.0
    best = z.sort(descending=True)
    assert torch.equal(routing.indices, best.indices[:, :3])
    torch.testing.assert_close(routing.weights, best.values[:, :3].softmax(-1))
    torch.testing.assert_close(routing.probs, z.softmax(-1))


def test_one_chosen_expert_has_the_full_softmax_probability() -> None:
    router = NoisyTopKRouter(4, 6, k=1).eval()
    x = torch.randn(10, 4)
    torch.testing.assert_close(router(x).weights.squeeze(-1), router.gate(x).softmax(-1).max(-1).values)


def test_noise_has_the_stated_standard_deviation() -> None:
    router = NoisyTopKRouter(4, 3, k=1).train()
    with torch.no_grad():
        router.noise.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    routing = router(torch.zeros(20_000, 4))
    noise = routing.noisy_logits - routing.logits
    expected = torch.nn.functional.softplus(torch.tensor([-1.0, 0.0, 2.0]))
    # standard error of a standard deviation: sigma / sqrt(2 n), five of them
    assert ((noise.std(0) - expected).abs() < 5 * expected / (2 * 20_000) ** 0.5).all()
    torch.testing.assert_close(routing.noise_std[0], expected)


def test_evaluation_draws_no_noise_and_leaves_the_generator_alone() -> None:
    router = NoisyTopKRouter(4, 3, k=1).eval()
    state = torch.get_rng_state()
    assert router(torch.randn(0, 4)).noisy_logits is None
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_module_routes_in_fp32() -> None:
    router = SoftmaxRouter(4, 3).bfloat16()
    assert router(torch.randn(2, 4).bfloat16()).logits.dtype == torch.float32


def test_linear_fp32_keeps_float64() -> None:
    layer = torch.nn.Linear(4, 3).double()
    x = torch.randn(2, 4).double()
    assert torch.equal(linear_fp32(layer, x), layer(x))


def test_too_many_chosen_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="k: expected at most num_experts = 3, got 4"):
        NoisyTopKRouter(4, 3, k=4)
