"""MoELayer: tokens to tokens with the experts, routers and dispatch of the head."""

import pytest
import torch
from torch.nn import functional as F

from moe_heads import Capacity, MoELayer, SparseMoE, ablate, capacity, collect_routing
from moe_heads.experts import Experts
from moe_heads.routers import ExpertChoiceRouter
from tests.support.head_zoo import EXPERTS, FEATURES, ROUTERS

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def layer(**options: object) -> MoELayer:
    sizes = {"num_experts": EXPERTS, "expert_width": 5}
    return MoELayer(FEATURES, 6, **(sizes | options)).double().eval()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("k", [1, 2])
def test_each_token_is_the_weighted_sum_of_its_experts(activation: str, k: int) -> None:
    module = layer(activation=activation, k=k, num_shared_experts=2)
    x = torch.randn(3, 7, FEATURES).double()
    output = module(x, return_routing=True)
    gates = output.routing.gates.view(3, 7, EXPERTS)

    def run(experts: Experts, expert: int, token: torch.Tensor) -> torch.Tensor:
        weight1, bias1, weight2, bias2 = (stack[expert] for stack in experts.stacks())
        return weight2 @ ACTIVATIONS[activation](weight1 @ token + bias1) + bias2

    for sample in range(3):
        for place in range(7):
            token = x[sample, place]
            assert module.shared is not None
            expected = run(module.shared, 0, token) + run(module.shared, 1, token)
            for expert in range(EXPERTS):
                if gates[sample, place, expert]:
                    expected = expected + gates[sample, place, expert] * run(module.experts, expert, token)
            torch.testing.assert_close(output.output[sample, place], expected)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_the_mean_over_the_tokens_is_the_head(router: str) -> None:
    given = {} if router == "noisy_top_k" else {"router": ROUTERS[router]()}
    sizes = {"num_experts": EXPERTS, "expert_width": 5, "dropout": 0.0}
    module = MoELayer(FEATURES, 3, activation="relu", **sizes, **given).double().eval()
    head = SparseMoE(FEATURES, 3, **sizes, **given).double().eval()
    head.load_state_dict(module.state_dict())
    x = torch.randn(4, 6, FEATURES).double()
    torch.testing.assert_close(module(x).mean(1), head(x))
    torch.testing.assert_close(module(x[:, 0]), head(x[:, 0]))


def test_pixels_keep_their_places() -> None:
    module = layer()
    x = torch.randn(2, 3, 4, FEATURES).double()
    output = module(x, return_routing=True)
    assert output.output.shape == (2, 3, 4, 6)
    assert output.routing.rows_per_sample == 12
    torch.testing.assert_close(output.output, module(x.flatten(1, 2)).view(2, 3, 4, 6))


def test_experts_choose_among_the_tokens_of_a_sample() -> None:
    module = layer(router=ExpertChoiceRouter(FEATURES, EXPERTS, k=1))
    x = torch.randn(2, 8, FEATURES).double()
    torch.testing.assert_close(module(x)[:1], module(x[:1]))


def test_default_sizes_and_counts() -> None:
    module = MoELayer(32, num_experts=4, expert_width=8, num_shared_experts=1)
    expert = 8 * 33 + 32 * 9
    assert module.out_features == 32
    assert capacity(torch.nn.Sequential(module)) == Capacity(33 * 4 + 5 * expert, 33 * 4 + 3 * expert)
    flops = module.flops(batch=2, tokens=3)
    assert flops.total == 6 * (2 * 32 * 4 + 5 * 2 * 2 * 32 * 8)
    assert flops.active == 6 * (2 * 32 * 4 + 3 * 2 * 2 * 32 * 8)
    assert "in_features=32, out_features=32, parameters=" in repr(module)


def test_collects_and_ablates_like_a_head() -> None:
    module = layer()
    model = torch.nn.Sequential(torch.nn.Linear(4, FEATURES).double(), module)
    with collect_routing(model) as routing:
        model(torch.randn(5, 3, 4).double())
    assert int(routing.stats["1"].counts.sum()) == 30
    assert ablate(module, [0]).num_experts == EXPERTS - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    assert module(torch.randn(2, 3, FEATURES).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of 'relu', 'gelu', 'silu', got 'tanh'"),
        ({"out_features": 0}, "out_features: expected an integer of at least 1, got 0"),
        ({"k": 9}, "k: expected at most num_experts = 8, got 9"),
        ({"router": ExpertChoiceRouter(4, 8)}, "router: expected one for in_features = 8, got one for 4"),
        ({"router": ExpertChoiceRouter(8, 8), "k": 1}, "k: expected no value, since router sets it, got 1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(8, **options)


@pytest.mark.parametrize("shape", [(8,), (2, 7)])
def test_wrong_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected floating point numbers of shape \(B, ..., 8\), got"):
        MoELayer(8)(torch.randn(shape))
