"""SoftMoE against the per-sample loops, with and without slots."""

import pytest
import torch
from torch.nn import functional as F

from moe_heads import SoftMoE
from tests.support.reference_heads import soft_loop, soft_token_loop


def small_head(**options: object) -> SoftMoE:
    return SoftMoE(7, 3, **({"num_experts": 4, "expert_width": 5, "dropout": 0.0} | options)).double().eval()


def test_pooled_features_are_the_softmax_mixture() -> None:
    head = small_head(temperature=0.7)
    x, y = torch.randn(6, 7).double(), torch.randint(3, (6,))
    torch.testing.assert_close(head(x), soft_loop(head, x))
    parameters = list(head.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(F.cross_entropy(head(x), y), parameters),
        torch.autograd.grad(F.cross_entropy(soft_loop(head, x), y), parameters),
    )


@pytest.mark.parametrize("slots", [1, 3])
def test_tokens_equal_soft_moe_slot_by_slot(slots: int) -> None:
    head = small_head(slots_per_expert=slots)
    x = torch.randn(2, 5, 7).double()
    torch.testing.assert_close(head(x), soft_token_loop(head, x))


@pytest.mark.parametrize("slots", [1, 3])
def test_one_token_equals_pooled_features(slots: int) -> None:
    head = small_head(slots_per_expert=slots)
    x = torch.randn(6, 7).double()
    torch.testing.assert_close(head(x.unsqueeze(1)), head(x))


def test_gates_of_slots_sum_to_one_per_row() -> None:
    routing = small_head(slots_per_expert=3)(torch.randn(2, 5, 7).double(), return_routing=True).routing
    assert routing.gates.shape == (10, 4)
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(10).double())
    assert routing.rows_per_sample == 5


def test_high_temperature_flattens_the_gate() -> None:
    head = small_head(temperature=1e6)
    gates = head(torch.randn(6, 7).double(), return_routing=True).routing.gates
    torch.testing.assert_close(gates, torch.full_like(gates, 0.25), rtol=0, atol=1e-5)


def test_nan_row_poisons_only_its_own_logits() -> None:
    x = torch.randn(8, 7).double()
    x[3] = float("nan")
    output = small_head()(x, return_routing=True)
    assert output.logits.isnan().any(-1).nonzero().flatten().tolist() == [3]
    assert output.aux_loss.isfinite()


def test_study_defaults() -> None:
    head = SoftMoE(512, 10)
    assert (head.num_experts, head.expert_width, head.router.balance) == (8, 64, {"kl": 0.2})


def test_default_balance_is_not_shared_between_heads() -> None:
    first = SoftMoE(4, 2)
    first.router.balance["kl"] = 9.0
    assert SoftMoE(4, 2).router.balance == {"kl": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"slots_per_expert": 0}, "slots_per_expert: expected an integer of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected a finite number above 0, got -1.0"),
        ({"dropout": -0.1}, r"dropout: expected a number in \[0, 1\), got -0.1"),
        ({"balance": {"load": 0.1}}, "balance: expected one of 'kl', 'importance', 'z', got 'load'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftMoE(16, 3, **options)
