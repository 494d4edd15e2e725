"""Analyses with a budget of time in a training, by a simulated clock."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_heads.analysis import Ranks
from moe_heads.callbacks import (
    AnalysisInputs,
    CriticalSharpnessCallback,
    ExpertUtilizationCallback,
    InferenceTimingCallback,
    SharpnessCallback,
    TrainingMonitor,
)
from moe_heads.callbacks._shared.loop_context import LoopContext
from moe_heads.callbacks._shared.point_costs import PointCosts
from tests.support.analyses import MeanLoss
from tests.support.clocks import Clock
from tests.support.hessians import classification, cross_entropy
from tests.support.processes import NUM_RANKS, run_on_ranks


class Costly(MeanLoss):
    """An analysis that takes as many seconds as it has hundreds of samples."""

    name = "costly"
    num_seen: int = 0

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(loss_fn=cross_entropy, splits=["train"], **options)
        self.clock = clock

    def compute(self, inputs: AnalysisInputs) -> float:
        self.num_seen = inputs.batches.num_samples
        self.clock.now += self.num_seen / 100
        return super().compute(inputs)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(PointCosts, "clock", staticmethod(clock))
    return clock


def trained(clock: Clock, *analyses: Any, num_steps: int, state: Any = None, batch_size: int = 200) -> Any:
    """A training with steps of a second."""
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3).double(), classification(batch_size, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = TrainingMonitor(analyses, loss_fn=cross_entropy)
    if state is not None:
        monitor.load_state_dict(state)
    monitor.start(model, optimizer, train=[batch])
    for _ in range(num_steps):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        clock.now += 1
        monitor.step(model, batch)
    return monitor, model


def test_the_points_take_at_most_their_share(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.1, num_samples=200)
    trained(clock, analysis, num_steps=100)
    steps = list(analysis.tracked_steps["train"])
    # 4/3 of a step are expected at first, and 2 s are measured
    assert steps == [14, 40, 60, 80, 100]
    assert list(analysis.costs.seconds) == steps and set(analysis.costs.seconds.values()) == {2.0}
    assert analysis.costs.overhead() == pytest.approx(0.1) and analysis.num_seen == 200


def test_the_points_of_others_pay_for_nothing(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.1, num_samples=200)
    other = Costly(clock, every_n_train_steps=5, num_samples=200, name="other")
    trained(clock, other, analysis, num_steps=100)
    assert list(analysis.tracked_steps["train"]) == [14, 40, 60, 80, 100]


def test_a_point_that_is_too_expensive_has_fewer_samples(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.002, num_samples=200)
    with pytest.warns(UserWarning, match=r"costly: 1000 steps do not pay .* made smaller: 100 samples\. Raise"):
        # expected are 4/3 · 200 / 80 steps, more than the 2 s that 1000 steps earn
        # halved, the first one takes 5/3 steps' time, which 834 steps earn
        trained(clock, analysis, num_steps=834, batch_size=80)
    assert list(analysis.costs.seconds) == [834]
    assert analysis.num_samples == 200


def test_the_samples_of_a_smaller_point(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.5, num_samples=200)
    assert analysis._budget is not None
    analysis._budget.level = 2
    with analysis.timed_point(3):
        assert analysis.num_samples == 50
    assert analysis.num_samples == 200 and analysis.costs.seconds == {3: 0.0}


def test_a_training_that_does_not_pay_for_a_point_says_so(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.01)
    monitor, model = trained(clock, analysis, num_steps=20)
    with pytest.warns(UserWarning, match="costly: the training did not pay for a point with max_overhead=0.01"):
        monitor.end(model)


def test_a_resumed_training_continues_its_budget(clock: Clock) -> None:
    analysis = Costly(clock, max_overhead=0.1, num_samples=200)
    state = trained(clock, analysis, num_steps=45)[0].state_dict()
    clock.now += 1000
    again = Costly(clock, max_overhead=0.1, num_samples=200)
    trained(clock, again, num_steps=40, state=state)
    assert list(again.tracked_steps["train"]) == [14, 40, 60, 80]
    assert again.costs.training_seconds() == 85


def test_critical_sharpness_with_a_budget(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CriticalSharpnessCallback._measure

    def measured(self: Any, *args: Any) -> None:
        clock.now += 3
        real(self, *args)

    monkeypatch.setattr(CriticalSharpnessCallback, "_measure", measured)
    callback = CriticalSharpnessCallback(max_overhead=0.1, on_error="raise")
    trained(clock, callback, num_steps=95)
    # 7/3 of a step are expected at first
    assert list(callback.tracked_steps["train"]) == [24, 60, 90]
    assert "at steps chosen by the clock for at most 10 % more time" in callback.summary()
    assert CriticalSharpnessCallback().every_n_train_steps == 10


def steps_on(rank: int) -> list[int]:
    clock = Clock()
    PointCosts.clock = staticmethod(clock)
    LoopContext.ranks = lambda self, name: Ranks(dist.group.WORLD, name)
    analysis = Costly(clock, max_overhead=0.1, num_samples=200)
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3).double(), classification(200, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = TrainingMonitor([analysis], loss_fn=cross_entropy)
    monitor.start(model, optimizer, train=[batch])
    for _ in range(50):
        cross_entropy(model, batch).backward()
        optimizer.step()
        clock.now += 1 + 9 * rank  # the clock of the other rank would allow many more points
        monitor.step(model, batch)
    return list(analysis.tracked_steps["train"])


@pytest.mark.timeout(200)
def test_rank_zero_decides(tmp_path: Path) -> None:
    assert run_on_ranks(steps_on, tmp_path, leaves_traces=True) == [[14, 40]] * NUM_RANKS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SharpnessCallback(max_overhead=0.1, every_n_train_steps=5),
            "max_overhead: expected None with",
        ),
        (
            lambda: CriticalSharpnessCallback(5, max_overhead=0.1),
            "expected None with every_n_train_steps=5",
        ),
        (lambda: SharpnessCallback(max_overhead=0), "max_overhead: expected a finite number above 0 or None, got 0"),
        (lambda: SharpnessCallback(max_overhead=2.0), "expected a share of the training time, above 0 and at most 1"),
        (lambda: ExpertUtilizationCallback(max_overhead=0.1), "runs no pass of its own"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_points_whose_size_is_fixed() -> None:
    assert InferenceTimingCallback(max_overhead=0.1).most_levels == 0
    assert CriticalSharpnessCallback(max_overhead=0.1).most_levels == 0
    sharpness = SharpnessCallback(max_overhead=0.1, num_samples=256)
    assert sharpness.most_levels == 3 and sharpness.described_point(2) == "64 samples, without the trace"


def test_without_a_budget_nothing_is_kept(clock: Clock) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis = Costly(clock, every_n_train_steps=10, num_samples=200)
        trained(clock, analysis, num_steps=20)
    assert set(analysis.kept_in_checkpoints()) == {"tracked_steps"}
