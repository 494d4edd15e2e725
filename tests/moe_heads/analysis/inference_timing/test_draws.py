"""Statistics over draws, against closed forms and simulated times with a known spread."""

import numpy as np
import pytest

from moe_heads.analysis.inference_timing.draws import (
    bootstrap_draws,
    interval_of,
    median_of,
    quantiles_of,
    spread_of,
)
from moe_heads.analysis.inference_timing.statistics import bootstrap, median_interval


def drawn(levels: list[float], noise: float, seed: int, num_rounds: int = 40) -> list[list[list[float]]]:
    """Return times of draws around different levels, with the same slow phases."""
    rng = np.random.default_rng(seed)
    phases = 1 + 0.5 * (np.arange(num_rounds) // 5 % 4 == 0)
    return [((level + noise * rng.standard_normal((num_rounds, 2))) * phases[:, None]).tolist() for level in levels]


def test_one_draw_has_the_statistics_of_its_runs() -> None:
    (rounds,) = drawn([10.0], 1.0, 0)
    times = np.concatenate(rounds)
    assert median_of([rounds]) == np.median(times)
    assert interval_of([rounds], 0) == median_interval(rounds)
    assert quantiles_of([rounds], [0.5, 0.9]) == np.quantile(times, [0.5, 0.9]).tolist()
    assert spread_of([rounds], 0) is None
    one = bootstrap_draws(lambda a: 2 * a, [[rounds]], 3)
    assert one == bootstrap(lambda a: 2 * a, [rounds], 3)


def test_the_interval_of_the_median_is_that_of_the_noise_however_far_the_draws_are_apart() -> None:
    draws = [[[level]] * 12 for level in (1.0, 5.0, 90.0)]
    assert median_of(draws) == 5.0
    assert interval_of(draws, 0) == (5.0, 5.0)
    ratio = bootstrap_draws(lambda a, b: a / b, [draws, [[[2.0]] * 12] * 3], 0)
    assert ratio == (2.5, 2.5, 2.5)


def test_each_draw_has_the_same_weight_in_a_percentile_whatever_its_number_of_runs() -> None:
    few, many = [[100.0]] * 10, [[1.0] * 8] * 10
    assert quantiles_of([few, many], [0.25, 0.5, 0.51, 0.99]) == [1.0, 1.0, 100.0, 100.0]


def test_the_spread_is_that_of_the_draws_and_the_noise_that_of_one_median() -> None:
    levels, noise = [8.0, 9.0, 10.0, 11.0, 12.0], 0.5
    rng = np.random.default_rng(1)
    draws = [(level + noise * rng.standard_normal((60, 2))).tolist() for level in levels]
    spread = spread_of(draws, 0)
    assert spread.between_ms == pytest.approx(np.std(levels, ddof=1), rel=0.1)
    # the standard error of the median of n normal numbers is 1.25 σ / sqrt(n), and the intervals are a little wider
    expected = 1.2533 * noise / np.sqrt(120)
    assert expected < spread.within_ms < 2.5 * expected
    assert spread.is_significant


def test_draws_without_a_difference_are_significant_in_at_most_5_of_100_trials() -> None:
    # common phases are in all draws, and the noise of 20 % hides the allowance
    found = [spread_of(drawn([10.0] * 4, 2.0, seed, num_rounds=15), seed) for seed in range(60)]
    assert sum(spread.is_significant for spread in found) <= 0.1 * len(found)
    apart = [spread_of(drawn([10.0, 14.0, 10.0, 18.0], 2.0, seed, num_rounds=15), seed) for seed in range(20)]
    assert sum(spread.is_significant for spread in apart) == 20


def test_a_difference_below_the_allowance_for_drift_is_not_significant() -> None:
    draws = [[[10.0 * level]] * 12 for level in (1.0, 1.03)]
    assert not spread_of(draws, 0).is_significant
    assert spread_of([[[10.0]] * 12, [[10.5]] * 12], 0).is_significant


def test_few_rounds_have_no_noise() -> None:
    spread = spread_of([[[1.0]] * 2, [[2.0]] * 2], 0)
    assert np.isnan(spread.between_ms)
    assert np.isinf(spread.within_ms)
