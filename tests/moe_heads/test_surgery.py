"""Heads made from trained heads."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moe_heads import NOISY_TOP_K, Dense, SoftMoE, ablate, capacity, upcycle
from moe_heads.routers import ExpertChoiceRouter
from tests.support.head_zoo import CLASSES, EXPERTS, FEATURES, ROUTERS, head_with
from tests.support.reference_heads import gated_loop


@pytest.mark.parametrize("k", [2, 4])
def test_an_upcycled_head_starts_with_the_logits_of_the_dense_one(k: int) -> None:
    dense = Dense(8, 3, width=5).double().eval()
    head = upcycle(dense, num_experts=4, k=k)
    x = torch.randn(6, 8).double()
    torch.testing.assert_close(head(x), dense(x))
    assert head.expert_width == 5
    assert not head.training
    assert head.router.gate.weight.dtype == torch.float64


def test_upcycled_with_one_expert_a_row_scales_the_logits_by_the_gate() -> None:
    dense = Dense(8, 3, width=5).eval()
    head = upcycle(dense, num_experts=4, k=1)
    x = torch.randn(6, 8)
    output = head(x, return_routing=True)
    torch.testing.assert_close(output.logits, output.routing.weights * dense(x))


def test_upcycled_experts_are_copies_that_part_in_training() -> None:
    dense = Dense(8, 3, width=5, dropout=0.3)
    before = [p.clone() for p in dense.parameters()]
    head = upcycle(dense, num_experts=4, noisy=False, balance=None)
    assert head.experts.dropout == 0.3
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    head(torch.randn(40, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(head.experts.fc1.weight[0], head.experts.fc1.weight[1])
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), before, strict=True))


def test_upcycling_a_pruned_head_copies_its_weights_by_name() -> None:
    dense = Dense(8, 3, width=8).eval()
    prune.l1_unstructured(dense.layers[0], "weight", 0.5)
    x = torch.randn(6, 8)
    torch.testing.assert_close(upcycle(dense, num_experts=8, k=2)(x), dense(x))


def test_ablating_a_parametrized_head_is_refused() -> None:
    head = head_with("switch")
    torch.nn.utils.parametrizations.weight_norm(head.router.gate)
    with pytest.raises(ValueError, match="head: expected a head without parametrizations, got a parametrized one"):
        ablate(head, [0])


def test_upcycling_takes_the_options_of_the_study() -> None:
    assert upcycle(Dense(8, 3), 4, **NOISY_TOP_K).router.noise is not None


def test_an_upcycled_head_takes_a_router() -> None:
    head = upcycle(Dense(8, 3), num_experts=4, router=ExpertChoiceRouter(8, 4))
    assert isinstance(head.router, ExpertChoiceRouter)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_an_ablated_head_is_the_head_whose_gates_were_never_open(router: str) -> None:
    head = head_with(router, num_shared_experts=1)
    x = torch.randn(9, FEATURES).double()
    smaller = ablate(head, [1])
    gates = torch.zeros(9, EXPERTS).double()
    gates[:, [0, 2, 3]] = smaller.router(x).gates
    torch.testing.assert_close(smaller(x), gated_loop(head, x, gates))
    assert smaller.num_experts == 3
    assert head.num_experts == EXPERTS
    assert capacity(head).total - capacity(smaller).total > head.experts.parameters_per_expert


def test_ablated_top_k_is_the_gate_with_an_infinite_penalty() -> None:
    head = head_with("noisy_top_k")
    x = torch.randn(9, FEATURES).double()
    smaller = ablate(head, [0, 3])
    with torch.no_grad():
        head.router.gate.bias[[0, 3]] = -1e9
    torch.testing.assert_close(smaller(x), head(x))


@pytest.mark.parametrize("router", ["switch", "softmax"])
def test_other_ablated_routers_are_the_gate_with_an_infinite_penalty(router: str) -> None:
    head = head_with(router)
    x = torch.randn(9, FEATURES).double()
    smaller = ablate(head, [0, 3])
    with torch.no_grad():
        head.router.gate.bias[[0, 3]] = -1e9
    torch.testing.assert_close(smaller(x), head(x))


def test_an_ablated_bias_balanced_router_keeps_the_bias_of_the_others() -> None:
    head = head_with("bias_balanced")
    head.router.bias_steps.copy_(torch.tensor([1, 2000, 3, -4]))
    assert ablate(head, [0]).router.bias_steps.tolist() == [2000, 3, -4]


def test_frozen_parameters_stay_frozen() -> None:
    head = head_with("noisy_top_k").requires_grad_(False)
    assert not any(p.requires_grad for p in ablate(head, [0]).parameters())


def test_an_ablated_soft_head_keeps_the_slots_of_the_others() -> None:
    head = SoftMoE(8, 3, num_experts=3, expert_width=4, slots_per_expert=2, dropout=0.0).double()
    x = torch.randn(2, 5, 8).double()
    smaller = ablate(head, [2])
    with torch.no_grad():
        head.router.gate.bias[4:] = -1e9
    torch.testing.assert_close(smaller(x), head(x))


def test_ablation_of_nothing_is_an_independent_copy() -> None:
    head = head_with("bias_balanced", num_shared_experts=1)
    state = torch.get_rng_state()
    copy = ablate(head, [])
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, FEATURES).double()
    torch.testing.assert_close(copy(x), head(x))
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in head.parameters()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: upcycle(nn.Linear(8, 3), 4), "dense_head: expected a moe_heads.Dense, got Linear"),
        (lambda: upcycle(Dense(8, 3), 0), "num_experts: expected an integer of at least 1, got 0"),
        (lambda: upcycle(Dense(8, 3), 4, k=5), "k: expected at most num_experts = 4, got 5"),
        (lambda: upcycle(Dense(8, 3), 4, expert_width=5), "expert_width: expected no value, since the dense .* got 5"),
        (
            lambda: upcycle(Dense(8, 3), 4, num_shared_experts=1),
            "num_shared_experts: expected no value, since shared experts would add to the logits of the dense head",
        ),
        (lambda: ablate(Dense(8, 3), [0]), "head: expected a SoftMoE, SparseMoE or MoELayer, got Dense"),  # type: ignore[type-var]
        (lambda: ablate(head_with("switch"), [4]), r"experts: expected different integers from 0 to 3, got \[4\]"),
        (lambda: ablate(head_with("switch"), 1), r"experts: expected different integers from 0 to 3, got 1"),
        (lambda: upcycle(Dense(8, 3), 4, in_features=9), "in_features: expected no value, .* got 9"),
        (lambda: ablate(head_with("switch"), [1, 1]), r"experts: expected different integers .* got \[1, 1\]"),
        (lambda: ablate(head_with("noisy_top_k"), [0, 1, 2]), "experts: expected at least 2 remaining .*, got 1"),
    ],
)
def test_bad_arguments_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_classes_stay() -> None:
    assert ablate(head_with("switch"), [0])(torch.randn(2, FEATURES).double()).shape == (2, CLASSES)
