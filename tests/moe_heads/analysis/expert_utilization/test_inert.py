"""Experts that are inert: found in the analysis and, by their weights, while training."""

import math

import pytest
import torch
from torch import Tensor

from moe_heads import SoftMoE, SparseMoE, collect_routing
from moe_heads.analysis import expert_utilization
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.inert import INERT_BELOW, InertWarnings, inert_experts
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.analysis.expert_utilization.weight_health import WeightHealth


@torch.no_grad()
def scale(head: SparseMoE | SoftMoE, expert: int, factor: float) -> None:
    """Scale the second layer of an expert, and with it its output."""
    head.experts.fc2.weight[expert] *= factor
    head.experts.fc2.bias_by_expert[expert] *= factor


def test_below_the_bound_and_not_dead() -> None:
    norms = torch.tensor([1.0, 0.02, 0.0, 0.01, math.nan])
    assert inert_experts(norms, (), 0.03) == (1, 2, 3)
    assert inert_experts(norms, (3,), 0.015) == (2,)
    assert inert_experts(norms, (), 0.0) == (2,)


@pytest.mark.parametrize("kind", [SparseMoE, SoftMoE])
@pytest.mark.parametrize("factor", [0.0, 0.01, 0.5])
def test_scaling_the_second_layer_scales_the_norms(kind: type[SparseMoE | SoftMoE], factor: float) -> None:
    head, x = kind(16, 3, num_experts=5, expert_width=8), torch.randn(200, 16)
    before = expert_utilization(head, [(x,)]).heads["head"]
    # the median does not change if the expert is on the same side of it before and after
    assert before.output_norms is not None and before.weight_norms is not None
    expert = int(before.output_norms.argmin())
    scale(head, expert, factor)
    after = expert_utilization(head, [(x,)]).heads["head"]
    assert after.output_norms is not None and after.weight_norms is not None
    before.output_norms[expert] *= factor
    torch.testing.assert_close(after.output_norms, before.output_norms, rtol=1e-5, atol=0)
    assert float(after.weight_norms[expert]) == pytest.approx(factor, rel=0.3)
    assert expert not in after.dead_experts
    assert after.inert_experts == ((expert,) if factor < INERT_BELOW else ())
    metrics = after.metrics()
    assert metrics["num_inert_experts"] == (factor < INERT_BELOW)
    assert metrics["output_norm_min"] == pytest.approx(float(before.output_norms.min()), rel=1e-4)


def test_the_result_names_inert_experts_and_the_option_moves_the_bound() -> None:
    head, data = SparseMoE(16, 3, num_experts=4, expert_width=8), [(torch.randn(200, 16),)]
    scale(head, 2, 1e-4)
    result = expert_utilization(head, data)
    assert "Inert in head: 1 of 4 experts, number 2. They receive rows" in result.summary()
    assert "| 2 (inert) |" in result.texts()["head/experts"]
    assert "output norm" in result.texts()["head/experts"]
    assert expert_utilization(head, data, inert_below=1e-6).heads["head"].inert_experts == ()
    with pytest.raises(ValueError, match="inert_below"):
        expert_utilization(head, data, inert_below=2.0)


def test_a_dead_expert_is_not_inert() -> None:
    head = SparseMoE(16, 3, num_experts=4, expert_width=8)
    scale(head, 2, 0.0)
    with torch.no_grad():
        head.router.gate.bias[2] = -1e4
    found = expert_utilization(head, [(torch.randn(200, 16),)]).heads["head"]
    assert (found.dead_experts, found.inert_experts) == ((2,), ())


def epochs(head: SparseMoE, routers: TrainingRouters, x: Tensor) -> tuple[dict[str, float], list[str]]:
    routers.begin_batch()
    head.train()(x)
    routers.end_training_batch()
    report = routers.end_epoch(Ranks())["head"]
    return report.scalars, [text for text in report.warnings if "inert" in text]


def test_training_names_an_inert_expert_once() -> None:
    head, x = SparseMoE(16, 3, num_experts=4, expert_width=8), torch.randn(400, 16)
    with collect_routing(head) as collection:
        routers = TrainingRouters(head, collection, None, 0.01, 0.25)
        scalars, texts = epochs(head, routers, x)
        assert texts == [] and scalars["num_inert_experts"] == 0
        assert 0.5 < scalars["weight_norm_min"] <= 1 and 0.5 < scalars["stable_rank_min"] <= 1
        scale(head, 3, 1e-3)
        scalars, (text,) = epochs(head, routers, x)
        assert "1 of 4 experts inert: number 3 (0.1%) of the median weight norm" in text
        assert "optimizer" in text
        assert scalars["num_inert_experts"] == 1
        assert scalars["weight_norm_min"] == pytest.approx(1e-3, rel=0.2)
        scalars, texts = epochs(head, routers, x)
        assert texts == [] and scalars["num_inert_experts"] == 1
        scale(head, 0, 1e-3)
        _, (text,) = epochs(head, routers, x)
        assert "number 0" in text and "3 (" not in text


def test_numbers_that_are_not_finite_are_left_out() -> None:
    weights = WeightHealth(torch.full((3, 1), math.nan), torch.full((3, 1), math.nan))
    scalars: dict[str, float] = {}
    assert InertWarnings(0.03).add(scalars, "head", weights, ()) == []
    assert scalars == {"num_inert_experts": 0.0}
