"""Normalized input of a gate: the definition, the invariance, and the types."""

from collections.abc import Callable

import pytest
import torch

from moe_heads import SparseMoE
from moe_heads.routers import (
    BiasBalancedRouter,
    ExpertChoiceRouter,
    LinearRouter,
    NoisyTopKRouter,
    SoftmaxRouter,
    SwitchRouter,
)

BUILD: dict[str, Callable[..., LinearRouter]] = {
    "noisy_top_k": lambda **options: NoisyTopKRouter(8, 4, k=2, **options),
    "switch": lambda **options: SwitchRouter(8, 4, **options),
    "bias_balanced": lambda **options: BiasBalancedRouter(8, 4, **options),
    "expert_choice": lambda **options: ExpertChoiceRouter(8, 4, **options),
    "softmax": lambda **options: SoftmaxRouter(8, 4, **options),
}


@pytest.mark.parametrize("name", BUILD)
def test_the_gate_reads_rows_of_mean_zero_and_variance_one(name: str) -> None:
    router = BUILD[name](normalize=True).double().eval()
    x = torch.randn(20, 8, dtype=torch.float64) * torch.logspace(-2, 3, 20, dtype=torch.float64)[:, None] + 5
    # with the 1e-5 of torch's layer norm below the root
    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(router(x).logits, router.gate(scaled))
    assert "normalize=True" in repr(router) and "normalize" not in repr(BUILD[name]())


@pytest.mark.parametrize("name", BUILD)
def test_size_and_offset_of_a_row_change_no_choice(name: str) -> None:
    router = BUILD[name](normalize=True).double().eval()
    x = torch.randn(20, 8, dtype=torch.float64)
    torch.testing.assert_close(router(7 * x - 3).gates, router(x).gates, rtol=1e-4, atol=1e-5)


def test_noise_reads_the_same_rows_as_the_gate() -> None:
    router = NoisyTopKRouter(8, 4, k=2, normalize=True).double().train()
    assert router.noise is not None
    torch.nn.init.normal_(router.noise.weight)
    x = torch.randn(20, 8, dtype=torch.float64)
    small, large = router(x).noise_std, router(1000 * x).noise_std
    assert small is not None and large is not None
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


def test_half_precision_is_normalized_in_single() -> None:
    head = SparseMoE(8, 3, num_experts=4, normalize=True).to(torch.bfloat16).eval()
    x = (1000 + 4 * torch.randn(20, 8)).to(torch.bfloat16)
    routing = head(x, return_routing=True).routing
    assert routing is not None and routing.logits.dtype == torch.float32
    expected = torch.nn.functional.layer_norm(x.float(), (8,))
    router = head.router
    assert isinstance(router, LinearRouter)
    torch.testing.assert_close(router.gate_input(x), expected, rtol=0, atol=1e-4)


def test_a_constant_row_is_routed_by_the_bias() -> None:
    router = NoisyTopKRouter(8, 4, k=1, normalize=True).eval()
    routing = router(torch.full((3, 8), 2.0))
    torch.testing.assert_close(routing.logits, router.gate.bias.expand(3, -1))


def test_the_hessian_of_a_gradient_penalty_is_symmetric() -> None:
    """The third derivatives of torch's own layer norm are not (off by a tenth of the norm)."""
    router = NoisyTopKRouter(6, 4, k=2, noisy=False, normalize=True).double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    weight = torch.eye(6, dtype=torch.float64) + 0.1 * torch.randn(6, 6, dtype=torch.float64)

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        rows = x.clone().requires_grad_()
        logits = router(rows @ weight).logits
        (slope,) = torch.autograd.grad(logits.tanh().square().sum(), rows, create_graph=True)
        return slope.square().mean()

    hessian = torch.autograd.functional.hessian(penalty, weight).reshape(36, 36)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    assert hessian.abs().max() > 1e-3


def test_normalize_is_a_flag_and_belongs_to_the_router() -> None:
    with pytest.raises(ValueError, match="normalize: expected True or False, got 1"):
        NoisyTopKRouter(8, 4, k=2, normalize=1)
    with pytest.raises(ValueError, match="normalize: expected no value, since router sets it, got False"):
        SparseMoE(8, 3, num_experts=4, router=SwitchRouter(8, 4), normalize=False)
    router = SparseMoE(8, 3, num_experts=4, normalize=True).router
    assert isinstance(router, LinearRouter) and router.normalize
