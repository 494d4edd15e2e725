"""Parameter counts and their matching."""

import pytest
import torch
from torch import nn

from moe_heads import NOISY_TOP_K, Capacity, Dense, SoftMoE, SparseMoE, capacity, match_capacity
from moe_heads.routers import ExpertChoiceRouter, SoftmaxRouter, SwitchRouter


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (Dense(512, 10), Capacity(267_786, 267_786)),
        (SoftMoE(512, 10), Capacity(271_960, 271_960)),
        (SparseMoE(512, 10, **NOISY_TOP_K), Capacity(276_064, 71_068)),
        (SparseMoE(512, 10), Capacity(338_924, 138_032)),
    ],
)
def test_study_counts(head: nn.Module, expected: Capacity) -> None:
    """The parameter counts of arXiv 2601.15021, and of the default sparse head."""
    assert capacity(head) == expected


def test_model_with_heads_inside() -> None:
    model = nn.Sequential(nn.Linear(3, 512), SparseMoE(512, 10, **NOISY_TOP_K), nn.ModuleList([Dense(10, 4)]))
    rest = 4 * 512 + capacity(model[2]).total
    assert capacity(model) == Capacity(276_064 + rest, 71_068 + rest)


@pytest.mark.parametrize("kind", ["dense", "soft", "sparse"])
@pytest.mark.parametrize("measure", ["total", "active"])
def test_matches_within_the_tolerance_and_no_width_is_nearer(kind: str, measure: str) -> None:
    target = 200_000
    head = match_capacity(kind, 256, 10, **{measure: target})
    size = getattr(capacity(head), measure)
    assert abs(size - target) <= 0.02 * target
    name = "width" if kind == "dense" else "expert_width"
    for other in (getattr(head, name) - 1, getattr(head, name) + 1):
        rival = type(head)(256, 10, **{name: other})
        assert abs(getattr(capacity(rival), measure) - target) >= abs(size - target)


def test_options_reach_the_head() -> None:
    head = match_capacity("sparse", 64, 10, total=20_000, num_experts=4, k=1, noisy=False, balance={"switch": 0.01})
    assert (head.num_experts, head.k, head.router.noise) == (4, 1, None)


def test_does_not_touch_the_generator_before_the_one_head_is_built() -> None:
    torch.manual_seed(3)
    matched = match_capacity("dense", 512, 10, total=267_786)
    torch.manual_seed(3)
    assert torch.equal(matched.layers[0].weight, Dense(512, 10).layers[0].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"total": 500},
            r"total: .* within 2.0% of a sparse head, got 500. The closest head has .*expert_width=1: change the",
        ),
        ({}, "total, active: expected exactly one of the two, got total=None, active=None"),
        ({"total": 1, "active": 1}, "total, active: expected exactly one"),
        ({"total": 0}, "total: expected an integer of at least 1, got 0"),
        ({"total": 9, "expert_width": 3}, "expert_width: expected no value, since match_capacity chooses it, got 3"),
        ({"total": 9, "tolerance": 0.0}, "tolerance: expected a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_capacity("sparse", 64, 10, **arguments)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected one of 'dense', 'soft', 'sparse', got 'hard'"):
        match_capacity("hard", 64, 10, total=9)


def test_shared_experts_are_active_and_so_are_those_that_experts_choose_on_average() -> None:
    sizes = {"num_experts": 4, "expert_width": 8}
    plain = capacity(SparseMoE(16, 3, **sizes, num_shared_experts=0))
    shared = capacity(SparseMoE(16, 3, **sizes, num_shared_experts=2))
    expert = SparseMoE(16, 3, **sizes).experts.parameters_per_expert
    assert shared == Capacity(plain.total + 2 * expert, plain.active + 2 * expert)
    gate = 16 * 4 + 4
    chosen = capacity(SparseMoE(16, 3, **sizes, router=ExpertChoiceRouter(16, 4, k=1.5), num_shared_experts=0))
    assert chosen == Capacity(gate + 4 * expert, gate + round(1.5 * expert))
    soft = capacity(SparseMoE(16, 3, **sizes, router=SoftmaxRouter(16, 4), num_shared_experts=0))
    assert soft.active == soft.total == gate + 4 * expert


def test_a_fractional_number_of_active_experts_is_matched_too() -> None:
    head = match_capacity(
        "sparse", 64, 10, active=20_000, router=ExpertChoiceRouter(64, 8, k=0.05), num_shared_experts=0
    )
    assert abs(capacity(head).active - 20_000) <= 4


def test_matches_a_head_with_a_router_and_shared_experts() -> None:
    head = match_capacity("sparse", 64, 10, total=40_000, router=SwitchRouter(64, 8), num_shared_experts=1)
    assert abs(capacity(head).total - 40_000) < 800
    assert isinstance(head.router, SwitchRouter)
    assert all(p.device.type == "cpu" for p in head.parameters())
