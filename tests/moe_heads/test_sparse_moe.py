"""SparseMoE: values and error messages. The dispatch paths are tested in dispatch/."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_heads import NOISY_TOP_K, Dense, MoELayer, SparseMoE, collect_routing
from moe_heads.routers import SwitchRouter
from tests.support.reference_heads import expert_logits, sparse_loop


def small_head(**options: object) -> SparseMoE:
    defaults = {"num_experts": 5, "expert_width": 6, "k": 2, "dropout": 0.0, **NOISY_TOP_K}
    return SparseMoE(7, 3, **(defaults | options)).double().eval()


def test_all_experts_chosen_is_the_dense_softmax_mixture() -> None:
    head = small_head(k=5)
    x = torch.randn(4, 7).double()
    gates = head.router.gate(x).softmax(-1)
    each = torch.stack([torch.stack([expert_logits(head.experts, e, row) for e in range(5)]) for row in x])
    torch.testing.assert_close(head(x), (gates.unsqueeze(-1) * each).sum(1))


def test_identical_experts_equal_one_perceptron() -> None:
    head = small_head()
    with torch.no_grad():
        for stack in head.experts.stacks():
            stack.copy_(stack[:1].expand_as(stack))
    x = torch.randn(4, 7).double()
    torch.testing.assert_close(head(x), torch.stack([expert_logits(head.experts, 0, row) for row in x]))


def test_one_expert_equals_a_perceptron() -> None:
    head = small_head(num_experts=1, k=1)
    dense = Dense(7, 3, width=6, dropout=0.0).double()
    dense.load_state_dict({
        "layers.0.weight": head.experts.fc1.weight[0],
        "layers.0.bias": head.experts.fc1.bias_by_expert[0],
        "layers.3.weight": head.experts.fc2.weight[0],
        "layers.3.bias": head.experts.fc2.bias_by_expert[0],
    })
    x = torch.randn(4, 7).double()
    torch.testing.assert_close(head(x), dense(x))


@pytest.mark.parametrize("dispatch", ["all", "ragged"])
def test_a_row_does_not_depend_on_its_batch(dispatch: str) -> None:
    head = small_head(dispatch=dispatch)
    x = torch.randn(9, 7).double()
    torch.testing.assert_close(head(x), torch.cat([head(row.unsqueeze(0)) for row in x]))


@pytest.mark.parametrize("dispatch", ["all", "ragged"])
def test_permuting_the_experts_changes_nothing(dispatch: str) -> None:
    head = small_head(dispatch=dispatch)
    permuted = copy.deepcopy(head)
    order = torch.randperm(5)
    permuted.experts = head.experts.keep(order.tolist())
    with torch.no_grad():
        for parameter in permuted.router.gate.parameters():
            parameter.copy_(parameter[order])
    x = torch.randn(9, 7).double()
    torch.testing.assert_close(permuted(x), head(x))


@pytest.mark.parametrize("dispatch", ["all", "ragged"])
def test_tokens_are_routed_one_by_one_and_averaged(dispatch: str) -> None:
    head = small_head(dispatch=dispatch)
    x = torch.randn(3, 4, 7).double()
    output = head(x, return_routing=True)
    torch.testing.assert_close(output.logits, torch.stack([sparse_loop(head, tokens).mean(0) for tokens in x]))
    assert output.routing.indices.shape == (12, 2)
    assert output.routing.rows_per_sample == 4


@pytest.mark.parametrize("dispatch", ["all", "ragged"])
def test_an_empty_batch_gives_no_logits(dispatch: str) -> None:
    output = small_head(dispatch=dispatch)(torch.randn(0, 7).double(), return_routing=True)
    assert output.logits.shape == (0, 3)
    assert output.aux_loss == 0


@pytest.mark.parametrize("dispatch", ["all", "ragged"])
def test_nan_row_poisons_only_its_own_logits(dispatch: str) -> None:
    head = small_head(dispatch=dispatch).train()
    x = torch.randn(8, 7).double()
    x[3] = float("nan")
    output = head(x, return_routing=True)
    assert output.logits.isnan().any(-1).nonzero().flatten().tolist() == [3]
    assert output.aux_loss.isfinite()
    assert output.routing.stats().num_nonfinite == 1
    assert output.routing.stats().counts.sum() == 7 * head.k


def test_unreached_expert_gets_a_zero_gradient_not_none() -> None:
    head = small_head(dispatch="ragged", k=1)
    with torch.no_grad():
        head.router.gate.weight.zero_()
        head.router.gate.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    head(torch.randn(4, 7).double()).sum().backward()
    for parameter in head.experts.parameters():
        assert parameter.grad is not None
        of_experts = parameter.grad.view(5, -1)
        assert of_experts[0].abs().sum() > 0
        assert of_experts[1:].abs().sum() == 0


def test_one_chosen_expert_keeps_the_routers_gradient() -> None:
    head = small_head(k=1)
    F.cross_entropy(head(torch.randn(8, 7).double()), torch.randint(3, (8,))).backward()
    assert head.router.gate.weight.grad.abs().max() > 1e-6


def test_noise_in_training_only() -> None:
    head = small_head()
    x = torch.randn(64, 7).double()
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


def test_stands_where_a_linear_stood_in_any_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), SparseMoE(4, 3, num_experts=4))
    with collect_routing(model) as routing:
        loss = F.cross_entropy(model(torch.randn(5, 1, 8, 8)), torch.randint(3, (5,)))
    (loss + routing.aux_loss).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, r"k: expected at most num_experts = 8, got 9"),
        ({"k": 0}, r"k: expected an integer of at least 1, got 0"),
        ({"k": True}, r"k: expected an integer of at least 1, got True"),
        ({"num_experts": 0}, r"num_experts: expected an integer of at least 1, got 0"),
        ({"expert_width": -1}, r"expert_width: expected an integer of at least 1, got -1"),
        ({"expert_width": 1.5}, r"expert_width: expected an integer of at least 1, got 1.5"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": float("nan")}, r"temperature: expected a finite number above 0, got nan"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"dispatch": "mask"}, r"dispatch: expected one of 'auto', 'all', 'gathered', 'grouped', 'ragged', got 'mask'"),
        ({"balance": {"entropy": 1.0}}, r"balance: expected one of 'importance', .*, got 'entropy'"),
        ({"balance": {"load": -1.0}}, r"balance\['load'\]: expected a finite number of at least 0, got -1.0"),
        ({"balance": 0.2}, r"balance: expected a mapping such as \{'importance': 0.2\}, got 0.2"),
        ({"noisy": False, "balance": {"load": 0.2}}, r"balance\['load'\]: expected noisy=True, .*, got noisy=False"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMoE(16, 3, **options)


@pytest.mark.parametrize(
    ("options", "has_noise"),
    [
        ({}, False),
        ({"balance": {"importance": 0.2, "load": 0.2}}, True),
        ({"balance": {"importance": 0.2, "load": 0.0}}, False),
        ({"balance": None}, False),
        ({"noisy": True}, True),
        (dict(NOISY_TOP_K), True),
    ],
)
def test_the_noise_goes_with_the_load_loss(options: dict[str, object], has_noise: bool) -> None:
    for module in (SparseMoE(16, 3, **options), MoELayer(16, 3, **options)):
        assert (module.router.noise is not None) == has_noise


class Named(SparseMoE):
    """A subclass whose signature lists no option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


@pytest.mark.parametrize("kind", [SparseMoE, MoELayer, Named])
def test_every_option_that_a_router_ignores_is_refused(kind: Any) -> None:
    router = SwitchRouter(8, 4)
    assert kind(8, 3, num_experts=4, router=router).router is router
    ignored: dict[str, object] = {
        "k": 1,
        "noisy": False,
        "temperature": 2.0,
        "balance": {"switch": 0.1},
        "normalize": True,
    }
    for name, value in ignored.items():
        with pytest.raises(ValueError, match=f"{name}: expected no value, since router sets it, got"):
            kind(8, 3, num_experts=4, router=router, **{name: value})


def test_the_options_of_the_study_can_be_copied_and_sent() -> None:
    assert copy.deepcopy(NOISY_TOP_K) == pickle.loads(pickle.dumps(NOISY_TOP_K)) == NOISY_TOP_K


@pytest.mark.parametrize(("features", "normalizes"), [(2, False), (7, False), (8, True), (512, True)])
def test_the_gate_normalizes_enough_features(features: int, normalizes: bool) -> None:
    assert SparseMoE(features, 3).router.normalize == normalizes
    with pytest.raises(ValueError, match="normalize: expected False for in_features = 2, got True"):
        SparseMoE(2, 3, normalize=True)


def test_a_mask_by_position_is_named() -> None:
    with pytest.raises(ValueError, match="return_routing: expected True or False"):
        SparseMoE(16, 3)(torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.bool))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected floating point numbers .* got torch.int64 of shape \(2, 16\)"):
        SparseMoE(16, 3)(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(16,), (4, 15), (2, 3, 4, 16)])
def test_wrong_input_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected floating point numbers of shape \(B, 16\) or \(B, T, 16\), got"):
        SparseMoE(16, 3)(torch.randn(shape))
