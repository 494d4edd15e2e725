"""Intervals against closed forms, and in simulations of independent runs, correlated runs, and slow phases."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from moe_heads.analysis.inference_timing.statistics import bootstrap, median_interval, paired

Times = np.ndarray
Draw = Callable[[np.random.Generator, int, int], Times]


def independent(rng: np.random.Generator, rounds: int, runs: int) -> Times:
    """Lognormal with outliers: a run in fifty takes ten times as long."""
    times = np.exp(0.05 * rng.standard_normal((rounds, runs)))
    return times * np.where(rng.random((rounds, runs)) < 0.02, 10, 1)


def correlated(rng: np.random.Generator, rounds: int, runs: int) -> Times:
    """AR(1) with coefficient 0.9: nineteen runs hold as much information as one independent run."""
    noise, state = rng.standard_normal(rounds * runs), rng.standard_normal()
    states = []
    for shock in noise:
        state = 0.9 * state + np.sqrt(1 - 0.9**2) * shock
        states.append(state)
    return np.exp(0.05 * np.array(states)).reshape(rounds, runs)


def phases(rng: np.random.Generator, rounds: int, runs: int) -> Times:
    """The machine is 30 % slower half of the time, for five rounds on average."""
    slow = np.cumsum(rng.random(rounds) < 0.2) + rng.integers(2)
    return (1 + 0.3 * (slow % 2))[:, None] * np.exp(0.05 * rng.standard_normal((rounds, runs)))


@pytest.mark.parametrize("draw", [independent, correlated, phases])
@pytest.mark.parametrize(("rounds", "runs"), [(25, 8), (100, 1)])
def test_two_runs_of_one_model_differ_by_no_more_than_their_intervals(draw: Draw, rounds: int, runs: int) -> None:
    rng, num_trials = np.random.default_rng(0), 200
    apart = 0
    for _ in range(num_trials):
        first, second = (median_interval(draw(rng, rounds, runs).tolist()) for _ in range(2))
        apart += first[0] > second[1] or second[0] > first[1]
    assert apart <= 0.05 * num_trials


def test_the_interval_of_independent_runs_covers_the_median() -> None:
    rng, num_trials = np.random.default_rng(1), 300
    # of the lognormal with the outliers: the quantile 0.5 / 0.98 of the lognormal, outliers being above it
    truth = np.exp(0.05 * stats.norm.ppf(0.5 / 0.98))
    found = [median_interval(independent(rng, 25, 8).tolist()) for _ in range(num_trials)]
    assert sum(low <= truth <= high for low, high in found) >= 0.95 * num_trials - 3 * np.sqrt(num_trials * 0.05 * 0.95)


def test_a_shared_machine_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    times = independent(rng, 25, 8)
    quiet = median_interval(times.tolist())
    noisy = median_interval((times * np.linspace(1, 2, 25)[:, None]).tolist())
    assert noisy[1] - noisy[0] > 5 * (quiet[1] - quiet[0])


def test_six_runs_give_their_range_and_five_nothing() -> None:
    times = [[3.0], [1.0], [2.0], [6.0], [5.0], [4.0]]
    assert median_interval(times) == (1.0, 6.0)
    assert median_interval(times[:5]) == (0.0, float("inf"))
    assert median_interval([[1.0]]) == (0.0, float("inf"))


def test_the_ranks_are_those_of_the_binomial() -> None:
    # each block holds small and large times alike, so that only the binomial counts
    rounds = [[float(i), float(199 - i)] for i in range(100)]
    low, high = median_interval(rounds)
    rank = int(stats.binom.ppf(0.025, 200, 0.5))
    assert (low, high) == (rank - 1, 200 - rank)


def test_a_drift_that_meets_both_cancels_in_the_ratio() -> None:
    rng, num_trials, covered = np.random.default_rng(3), 40, 0
    widths = []
    for trial in range(num_trials):
        drift = np.exp(0.2 * np.cumsum(rng.standard_normal(25)))[:, None]
        dense, head = (drift * independent(rng, 25, 8) for _ in range(2))
        _, low, high = bootstrap(lambda a, b: a / b, [(2 * dense).tolist(), head.tolist()], trial)
        covered += low <= 2 <= high
        widths.append(high - low)
    assert covered >= 0.85 * num_trials
    assert np.median(widths) < 1


def test_the_bootstrap_is_a_function_of_its_seed_and_needs_six_rounds() -> None:
    times = independent(np.random.default_rng(4), 60, 3).tolist()
    intervals = [bootstrap(lambda a: a, [times], seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert bootstrap(lambda a: a, [times[:5]], 0)[1:] == (-float("inf"), float("inf"))


def test_the_bootstrap_draws_blocks_of_rounds() -> None:
    rng = np.random.default_rng(5)
    rounds = [rng.lognormal(size=size).tolist() for size in rng.integers(1, 4, size=40)]
    _, low, high = bootstrap(lambda a: a, [rounds], 6)
    # the same, one draw at a time: ten blocks of four rounds
    blocks = [np.concatenate(rounds[i : i + 4]) for i in range(0, 40, 4)]
    draws = np.random.default_rng(6).integers(10, size=(1000, 10))
    medians = [np.quantile(np.concatenate([blocks[i] for i in draw]), 0.5, method="inverted_cdf") for draw in draws]
    assert (low, high) == pytest.approx(tuple(np.quantile(medians, [0.025, 0.975])))


def test_modules_are_paired_by_the_rounds_that_all_took_part_in() -> None:
    short, long = [[1.0, 2.0]] * 3, [[float(i)] for i in range(5)]
    assert paired([short, long]) == [short, long[:3]]
    assert bootstrap(lambda a, b: b / a, [[[1.0]] * 6, [[2.0]] * 6 + [[900.0]] * 9], 0) == (2.0, 2.0, 2.0)
