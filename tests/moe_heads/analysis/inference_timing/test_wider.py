"""Heads with more hidden units, timed until one is faster than its dense twin."""

import pytest
import torch
from torch import nn

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.analysis import inference_timing
from moe_heads.analysis.inference_timing import wider
from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.speedup import GapPoint
from moe_heads.analysis.inference_timing.wider import wider_heads

PLAN = TimingPlan(batch_sizes=(4,), num_runs=6, seconds_per_size=0.05)


def widened(head: nn.Module) -> list[int]:
    head.eval()
    with torch.inference_mode():
        call = Call(head, (((torch.randn(4, 6),), {}),))
        found = wider_heads(head, call, Clock(torch.device("cpu")), PLAN, batch_size=4, seed=0, tick=lambda: None)
        return [each.width for each in found]


def test_widths_are_doubled_and_the_head_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wider, "_FACTORS", (2, 4))
    head = SparseMoE(6, 3, num_experts=4, expert_width=5, num_shared_experts=1)
    before, state = {name: p.clone() for name, p in head.state_dict().items()}, torch.get_rng_state()
    assert widened(head) == [10, 20]
    assert head.expert_width == head.experts.width == head.shared.width == 5
    assert all(torch.equal(before[name], p) for name, p in head.state_dict().items())
    torch.set_rng_state(state)
    assert widened(SoftMoE(6, 3, num_experts=4, expert_width=5)) == [10, 20]


def test_large_weights_and_heads_without_experts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert widened(Dense(6, 3)) == []
    head = SparseMoE(6, 3, num_experts=4, expert_width=5)
    monkeypatch.setattr(wider, "_MOST_BYTES", 2 * sum(p.nbytes for p in head.experts.parameters()))
    assert widened(head) == [10]


@pytest.mark.parametrize("standing", ["slower", "undecided", "faster"])
def test_only_a_head_that_is_not_faster_is_widened(standing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wider, "_FACTORS", (2,))
    monkeypatch.setattr(GapPoint, "standing", lambda self, allowance: standing)
    model = SparseMoE(6, 3, num_experts=4, expert_width=5).eval()
    result = inference_timing(model, torch.randn(1, 6), batch_sizes=[1], num_runs=6, seconds_per_size=0.05)
    assert [each.width for each in result.gaps[0].wider] == ([] if standing == "faster" else [10])


def test_a_head_with_as_many_operations_as_its_twin_is_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GapPoint, "standing", lambda self, allowance: "slower")
    model = SoftMoE(6, 3, num_experts=4, expert_width=5).eval()
    result = inference_timing(model, torch.randn(1, 6), batch_sizes=[1], num_runs=6, seconds_per_size=0.05)
    assert result.gaps[0].points[0].theoretical < 1.1 and not result.gaps[0].wider
