"""Budget of time: the steps at which points begin, by a simulated clock."""

import itertools
from collections.abc import Iterator

import pytest

from moe_heads.callbacks._shared.time_budget import TimeBudget


def simulated(budget: TimeBudget, costs: Iterator[float], num_steps: int) -> list[int]:
    """Steps with a point, for steps of a second."""
    begun = []
    for step in range(1, num_steps + 1):
        decided = budget.comes_within(step) and budget.decide(step, training=1.0 * step, first_cost=4.0)
        if decided and budget.follow(decided):
            begun.append(step)
            budget.pay(next(costs))
    return begun


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("cost", [0.3, 2.0, 4.0])
def test_the_share_holds_after_every_point_that_costs_as_much_as_expected(share: float, cost: float) -> None:
    budget = TimeBudget(share)
    budget.start(0)
    begun = simulated(budget, itertools.repeat(cost), 5000)
    assert all((number + 1) * cost <= share * step + 1e-9 for number, step in enumerate(begun))
    # the first one waits for four steps' time, the others for what they cost
    assert begun[0] == max(round(4 / share), 5)
    assert len(begun) == pytest.approx(min(share * 5000 / cost, 5000), abs=8)
    assert budget.spent == pytest.approx(cost * len(begun))


def test_an_unexpected_cost_is_earned_before_the_next_point() -> None:
    budget = TimeBudget(0.1)
    budget.start(0)
    begun = simulated(budget, itertools.cycle([30.0, 1.0, 1.0, 1.0]), 700)
    # 30 s at step 40 and the 30 s that the next one may cost take 600 steps of a second
    assert begun[:2] == [40, 600] and len(begun) > 2


def test_a_point_that_does_not_pay_in_a_thousand_steps_is_made_smaller() -> None:
    budget = TimeBudget(0.01)
    budget.start(0)
    first = budget.decide(5, training=5.0, first_cost=75.0, most_levels=8)
    assert not first.is_due and first.level == 3  # 75 / 8 is below the 10 s that a thousand steps earn
    budget.follow(first)
    assert budget.decide(first.next_step, training=first.next_step * 1.0, first_cost=75.0, most_levels=8).level == 3
    budget.pay(100.0)
    later = budget.decide(3000, training=3000.0, first_cost=75.0, most_levels=5)
    assert later.level == 5  # no more than that
    budget.follow(later)
    # the cost was that of a point of the third level
    assert budget.decide(13000, training=13000.0, first_cost=75.0, most_levels=5).is_due


def test_steps_of_a_resumed_training_have_their_own_speed() -> None:
    budget = TimeBudget(0.1)
    budget.start(1000)
    budget.pay(50.25)
    assert not budget.comes_within(1004) and budget.comes_within(1005)
    # another 50.25 s are allowed at 1005 s, after 5 of the new steps of half a second
    decision = budget.decide(1005, training=1002.5, earlier=1000.0, first_cost=1.0)
    assert not decision.is_due and decision.next_step == 1010


def test_state_of_a_checkpoint() -> None:
    budget, other = TimeBudget(0.1), TimeBudget(0.1)
    budget.start(0)
    budget.level = 2
    budget.pay(3.0)
    other.restore(budget.state())
    other.start(7)
    assert other.state() == budget.state() and other.spent == 3.0
    budget.forget()
    assert budget.spent == 0 and budget.level == 0
