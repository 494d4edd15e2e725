import math

import pytest
import torch

from moe_heads.analysis.inference_timing import outlook
from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.outlook import Outlook
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.row import Key


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Outlook:
    """Ten seconds, by a clock that stands still."""
    monkeypatch.setattr(outlook.time, "perf_counter", lambda: 0.0)
    return Outlook(TimingPlan(max_seconds=10, num_runs=4), torch.device("cpu"))


def test_the_first_size_runs_and_the_next_if_twice_its_pass_fits(ahead: Outlook) -> None:
    assert ahead.why_no_pass(10**9) == ""
    ahead.learn_pass(1, 1.0, 100)
    assert ahead.why_no_pass(5) == ""
    assert ahead.why_no_pass(6) == "may take about 12 s, and 10 s of max_seconds = 10 were left"


def test_a_stall_in_the_first_pass_is_forgotten_when_a_warm_one_is_known(ahead: Outlook) -> None:
    ahead.learn_pass(1, 9.0, 100)
    assert ahead.why_no_pass(2) != ""
    ahead.learn_round({Key(MODEL): 100.0, Key("backbone"): 190.0, Key(MODEL, "bf16"): 10.0, Key("x"): math.nan})
    assert ahead.why_no_pass(2) == ""
    # the smallest size is always timed
    assert ahead.why_no_rounds() == ""
    # one round to warm up and four: each three passes of 1 s
    ahead.learn_pass(2, 1.0, 100)
    assert ahead.why_no_rounds() == "may take about 15 s, and 10 s of max_seconds = 10 were left"
    ahead.forgive(6)
    assert ahead.why_no_rounds() == ""
    ahead.give_up()
    assert ahead.why_no_pass(3) == "batch 2 was too slow already"


def test_a_round_that_would_end_too_late_does_not_begin(ahead: Outlook) -> None:
    ahead.learn_pass(1, 1.0, 100)
    assert not ahead.is_over(99)
    ahead.learn_pass(2, 1.0, 100)
    assert not ahead.is_over(10)
    assert ahead.is_over(10.5)


def test_the_memory_of_a_size_follows_from_that_of_the_size_before(
    ahead: Outlook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "memory_budget", lambda *_, **__: 2**30)
    ahead.learn_pass(1, 0.01, 2**28)
    # and as much again for the kernels
    assert ahead.why_no_pass(2) == ""
    assert ahead.why_no_pass(4) == "would need about 2 GiB of memory, and 1 may be used"
