import math

import pytest

from moe_heads.analysis.inference_timing import cost
from moe_heads.analysis.inference_timing.calls import MODEL, RowKey
from moe_heads.analysis.inference_timing.cost import CostEstimate
from moe_heads.analysis.inference_timing.plan import TimingPlan


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch) -> CostEstimate:
    """Ten seconds with a clock that does not advance."""
    monkeypatch.setattr(cost.time, "perf_counter", lambda: 0.0)
    return CostEstimate(TimingPlan(max_seconds=10, num_runs=4))


def test_the_first_size_runs_and_the_next_if_twice_its_pass_fits(estimate: CostEstimate) -> None:
    assert estimate.why_no_pass(10**9) == ""
    estimate.add_pass(1, 1.0)
    assert estimate.why_no_pass(5) == ""
    assert estimate.why_no_pass(6) == "needs about 12 s, but 10 s of max_seconds = 10 remain"


def test_a_stall_in_the_first_pass_is_forgotten_when_a_warm_one_is_known(estimate: CostEstimate) -> None:
    estimate.add_pass(1, 9.0)
    assert estimate.why_no_pass(2) != ""
    estimate.add_round({
        RowKey(MODEL): [100.0],
        RowKey("backbone"): [190.0],
        RowKey(MODEL, "bf16"): [10.0],
        RowKey("x"): [math.nan],
    })
    assert estimate.why_no_pass(2) == ""
    # the smallest size is always timed
    assert estimate.why_no_rounds() == ""
    # one round to warm up and four: each three passes of 1 s
    estimate.add_pass(2, 1.0)
    assert estimate.why_no_rounds() == "needs about 15 s, but 10 s of max_seconds = 10 remain"
    estimate.exclude(6)
    assert estimate.why_no_rounds() == ""
    estimate.stop()
    assert estimate.why_no_pass(3) == "batch size 2 was already too slow"


def test_a_round_that_would_end_too_late_does_not_begin(estimate: CostEstimate) -> None:
    estimate.add_pass(1, 1.0)
    assert not estimate.is_over(99)
    estimate.add_pass(2, 1.0)
    assert not estimate.is_over(10)
    assert estimate.is_over(10.5)
