"""Seconds of points and of the training between them, by a simulated clock."""

import pytest

from moe_heads.callbacks._shared.point_costs import PointCosts
from tests.support.clocks import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(PointCosts, "clock", staticmethod(clock))
    return clock


def test_points_are_not_time_of_the_training(clock: Clock) -> None:
    costs = PointCosts()
    costs.start()
    clock.now += 10
    with costs.point(5):
        clock.now += 2
    with pytest.raises(RuntimeError), costs.point(9):
        clock.now += 1
        raise RuntimeError
    clock.now += 20
    assert costs.seconds == {5: 2.0, 9: 1.0}
    assert costs.training_seconds() == 30 and costs.overhead() == pytest.approx(0.1)
    assert costs.training_seconds(of_others=15) == 15 and costs.overhead(15) == pytest.approx(0.2)
    costs.stop()
    clock.now += 100
    assert costs.training_seconds() == 30


def test_a_resumed_training_goes_on_with_its_time(clock: Clock) -> None:
    costs, resumed = PointCosts(), PointCosts()
    costs.start()
    clock.now += 10
    with costs.point(5):
        clock.now += 2
    resumed.restore(costs.state())
    clock.now += 1000
    resumed.start()
    clock.now += 10
    assert resumed.seconds == {5: 2.0} and resumed.of_run == 0
    assert resumed.training_seconds() == 20 and resumed.earlier == 10
    assert resumed.overhead() == pytest.approx(0.1)


def test_nothing_before_the_start() -> None:
    costs = PointCosts()
    assert costs.training_seconds() == 0 and costs.overhead() == 0
