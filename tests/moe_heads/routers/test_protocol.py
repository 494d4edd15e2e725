"""Properties of every router."""

import pytest
import torch

from moe_heads import Router, Routing, SparseMoE
from moe_heads.routers import (
    BiasBalancedRouter,
    ExpertChoiceRouter,
    LinearRouter,
    NoisyTopKRouter,
    SoftmaxRouter,
    SwitchRouter,
    linear_fp32,
)
from tests.support.head_zoo import EXPERTS, FEATURES, ROUTERS, head_with


@pytest.mark.parametrize("name", list(ROUTERS))
@pytest.mark.parametrize("training", [False, True])
def test_gates_are_the_weights_at_the_chosen_places(name: str, training: bool) -> None:
    routing = head_with(name).router.train(training)(torch.randn(10, FEATURES).double())
    assert routing.gates.shape == (10, EXPERTS)
    assert torch.equal(routing.gates > 0, routing.selected) or name == "softmax"
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(10).double())
    assert routing.stats().counts.sum() == routing.selected.sum()


@pytest.mark.parametrize("name", list(ROUTERS))
def test_half_precision_module_routes_in_fp32(name: str) -> None:
    routing = head_with(name, torch.bfloat16).router(torch.randn(4, FEATURES).bfloat16())
    assert routing.logits.dtype == torch.float32
    assert routing.gates.dtype == torch.float32


@pytest.mark.parametrize("name", list(ROUTERS))
def test_autocast_changes_no_decision(name: str) -> None:
    router = head_with(name, torch.float32).router
    x = torch.randn(16, FEATURES)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert torch.equal(routing.logits, expected.logits)
    assert torch.equal(routing.selected, expected.selected)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_evaluation_is_deterministic_and_leaves_the_generator_alone(name: str) -> None:
    router = head_with(name).router
    x = torch.randn(6, FEATURES).double()
    state = torch.get_rng_state()
    assert torch.equal(router(x).gates, router(x).gates)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_the_gate_learns_from_the_task_loss(name: str) -> None:
    head = head_with(name).train()
    head(torch.randn(8, FEATURES).double()).square().sum().backward()
    assert head.router.gate.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_nan_row_poisons_its_own_logits_only(name: str) -> None:
    head = head_with(name).train()
    x = torch.randn(8, FEATURES).double()
    x[3] = float("nan")
    output = head(x, return_routing=True)
    assert output.logits.isnan().any(-1).nonzero().flatten().tolist() == [3]
    assert output.aux_loss.isfinite()
    assert output.routing.stats().num_nonfinite == 1
    assert output.routing.stats().margin_sum.isfinite()


@pytest.mark.parametrize("name", list(ROUTERS))
def test_keep_chooses_as_the_whole_router_would_among_the_kept(name: str) -> None:
    router = head_with(name).router
    x = torch.randn(6, FEATURES).double()
    kept = router.keep([0, 2, 3])
    assert kept.num_experts == 3
    assert router.num_experts == EXPERTS
    torch.testing.assert_close(kept(x).logits, router(x).logits[:, [0, 2, 3]])


class Adapted(torch.nn.Module):
    """What adapters such as LoRA put in the place of a layer: it has a forward, and no weight of its own."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * self.scale


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "bias_balanced"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_stands_in_the_place_of_the_gate_and_its_hooks_are_called(name: str, autocast: bool) -> None:
    router = head_with(name, torch.float32).router
    x = torch.randn(6, FEATURES)
    expected = router(x).logits
    router.gate = Adapted(router.gate)
    seen = []
    router.gate.register_forward_hook(lambda *arguments: seen.append(arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(router(x).logits, 3 * expected)
    assert len(seen) == 1


def test_linear_fp32_keeps_float64() -> None:
    layer = torch.nn.Linear(4, 3).double()
    x = torch.randn(2, 4).double()
    assert torch.equal(linear_fp32(layer, x), layer(x))


def test_a_router_of_ones_own_serves_in_a_head() -> None:
    class First(Router):
        """Sends every row to the first expert."""

        num_experts, k = 3, 1

        def forward(self, x: torch.Tensor, rows_per_sample: int = 1) -> Routing:
            logits = x.new_tensor([1.0, 0.0, 0.0]).expand(len(x), 3)
            zeros = torch.zeros(len(x), 1, dtype=torch.int64)
            return Routing(logits=logits, probs=logits.softmax(-1), indices=zeros, weights=x.new_ones(len(x), 1))

    head = SparseMoE(8, 2, num_experts=3, expert_width=4, dropout=0.0, router=First())
    head(torch.randn(5, 8)).sum().backward()
    assert head.k == 1
    assert head.experts.fc2.weight.grad[0].abs().sum() > 0
    assert head.experts.fc2.weight.grad[1:].abs().sum() == 0
    with pytest.raises(ValueError, match=r"head: expected a router that defines keep\(experts\), got"):
        head.router.keep([0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoisyTopKRouter(4, 3, k=4), "k: expected at most num_experts = 3, got 4"),
        (lambda: BiasBalancedRouter(4, 3, k=4), "k: expected at most num_experts = 3, got 4"),
        (lambda: BiasBalancedRouter(4, 3, update_rate=0), "update_rate: expected a finite number above 0, got 0"),
        (lambda: ExpertChoiceRouter(4, 3, k=3.5), "k: expected at most num_experts = 3, got 3.5"),
        (lambda: ExpertChoiceRouter(4, 3, k=0), "k: expected a finite number above 0, got 0"),
        (lambda: ExpertChoiceRouter(4, 3, balance={"load": 1.0}), "balance: expected one of 'z', 'kl', got 'load'"),
        (lambda: SwitchRouter(4, 3, jitter=1.0), r"jitter: expected a number in \[0, 1\), got 1.0"),
        (lambda: SwitchRouter(4, 0), "num_experts: expected an integer of at least 1, got 0"),
        (lambda: SoftmaxRouter(4, 3, slots_per_expert=0), "slots_per_expert: expected an integer of at least 1, got 0"),
        (lambda: SoftmaxRouter(4, 3, temperature=0), "temperature: expected a finite number above 0, got 0"),
    ],
)
def test_bad_arguments_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "switch"}, "router: expected a moe_heads.Router, got 'switch'"),
        ({"router": SwitchRouter(8, 5)}, "router: expected one for num_experts = 4, got one for 5"),
        ({"router": SwitchRouter(9, 4)}, "router: expected one for in_features = 8, got one for 9"),
        ({"router": SwitchRouter(8, 4), "k": 1}, "k: expected no value, since router sets it, got 1"),
        ({"num_shared_experts": -1}, "num_shared_experts: expected an integer of at least 1, got -1"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMoE(8, 3, num_experts=4, **options)


def test_every_router_has_a_linear_gate_in_its_repr() -> None:
    for name in ROUTERS:
        router = head_with(name).router
        assert isinstance(router, LinearRouter)
        assert "(gate): Gate" in repr(router)
        assert "balance=" in repr(router)
