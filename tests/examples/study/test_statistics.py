"""Statistics over seeds: closed forms, scipy, and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from study.quantities import ACCURACY, GAP, LAMBDA_TRAIN
from study.statistics import Comparison, adjusted, compare, correlate, estimate, student_interval

from tests.support.study_runs import make_run


def pair(ours: list[float], theirs: list[float], key: str = "plain/test/accuracy") -> list[dict[str, object]]:
    runs = [make_run("soft", seed, **{key: value}) for seed, value in enumerate(ours)]
    return runs + [make_run("dense", seed, **{key: value}) for seed, value in enumerate(theirs)]


def test_interval_in_closed_form() -> None:
    values = [1.0, 2.0, 4.0, 5.0]
    found = estimate(values)
    assert found is not None
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert found.num_seeds == 4


def test_ratios_have_the_geometric_mean() -> None:
    found = estimate([1.0, 100.0], is_ratio=True)
    assert found is not None and found.low is not None and found.high is not None
    assert found.mean == pytest.approx(10)
    assert found.low * found.high == pytest.approx(100)


def test_one_value_has_no_interval_and_none_no_estimate() -> None:
    assert estimate([3.0]) is not None and estimate([3.0]).low is None
    assert estimate([3.0]).format(".1f") == "3.0"
    assert estimate([]) is None
    assert student_interval([2.0, 2.0]) == (2.0, 2.0)


def test_the_interval_covers_the_truth_with_its_nominal_probability() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    intervals = [interval for interval in map(student_interval, draws) if interval is not None]
    covered = sum(low < 0 < high for low, high in intervals)
    # binomial, 95 % of 2000, four standard deviations
    assert abs(covered - 1900) < 4 * math.sqrt(2000 * 0.95 * 0.05)


def test_comparison_is_the_paired_t_test() -> None:
    ours, theirs = [0.91, 0.92, 0.90, 0.93], [0.90, 0.905, 0.90, 0.91]
    found = compare(pair(ours, theirs), ACCURACY, "soft", "dense")
    assert found is not None
    differences = np.subtract(ours, theirs)
    assert found.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found.difference.mean == pytest.approx(differences.mean())
    # Hedges' factor for 3 degrees of freedom is Γ(3/2) / (Γ(1) √(3/2)) = √π / (2 √1.5)
    factor = math.sqrt(math.pi) / 2 / math.sqrt(1.5)
    assert found.effect_size == pytest.approx(factor * differences.mean() / differences.std(ddof=1))


def test_ratios_are_compared_by_factors() -> None:
    found = compare(pair([2.0, 4.0, 8.0], [1.0, 2.0, 8.0], "sharpness/train/lambda_max"), LAMBDA_TRAIN, "soft", "dense")
    assert found is not None
    assert found.difference.mean == pytest.approx(4 ** (1 / 3))


def test_swapping_heads_and_reordering_runs() -> None:
    runs = pair([0.91, 0.92, 0.90], [0.90, 0.90, 0.905])
    one, other = compare(runs, ACCURACY, "soft", "dense"), compare(runs[::-1], ACCURACY, "dense", "soft")
    assert one is not None and other is not None
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.p_value == pytest.approx(other.p_value)


def test_only_seeds_that_both_have_count() -> None:
    runs = pair([0.91, 0.92], [0.90, 0.90, 0.99, 0.99])
    found = compare(runs, ACCURACY, "soft", "dense")
    assert found is not None and found.difference.num_seeds == 2
    assert compare(runs, ACCURACY, "soft", "hard") is None


def test_equal_differences_have_no_test() -> None:
    found = compare(pair([0.92, 0.93, 0.94], [0.90, 0.91, 0.92]), ACCURACY, "soft", "dense")
    assert found is not None
    assert found.p_value is None and found.sign == 0


def test_correction_for_many_comparisons() -> None:
    p_values = [0.001, 0.02, 0.03, 0.5]
    made = [Comparison(ACCURACY, "soft", "dense", estimate([1.0, 1.1]), None, p, (1.0, 1.1)) for p in p_values]
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    raw = [p * 4 * harmonic / rank for rank, p in enumerate(p_values, start=1)]
    expected = [min(1.0, *raw[i:]) if i < 3 else min(1.0, raw[i]) for i in range(4)]
    assert [c.adjusted_p_value for c in adjusted(made)] == pytest.approx(expected)
    assert [c.sign for c in adjusted(made)] == [1, 0, 0, 0]


def test_alike_is_asserted_wrongly_in_at_most_one_of_twenty() -> None:
    """The true difference is at the margin: two one-sided tests at 5 %."""
    draws = np.random.default_rng(1).normal(0.01, 0.003, size=(1000, 5))
    alike = [Comparison(GAP, "a", "b", estimate([0.0]), None, None, tuple(draw)).is_within(0.01) for draw in draws]
    assert sum(alike) < 1000 * 0.05 + 4 * math.sqrt(1000 * 0.05 * 0.95)
    assert sum(alike) > 10, "a rule that never says so would pass too"


def test_alike_and_different_exclude_each_other() -> None:
    for mean in np.linspace(-0.02, 0.02, 9):
        made = Comparison(GAP, "a", "b", estimate([0.0]), None, None, (mean - 1e-3, mean, mean + 1e-3))
        assert not (made.is_within(0.01) and made.is_beyond(0.01))
        assert made.is_within(0.01) == (abs(mean) < 0.008)


def test_margins_of_ratios_are_factors() -> None:
    made = Comparison(
        LAMBDA_TRAIN, "a", "b", estimate([1.0]), None, None, (math.log(1.1), math.log(1.11), math.log(1.12))
    )
    assert made.is_within(1.25) and not made.is_within(1.05)
    assert made.is_beyond(1.02)


def test_correlation_of_what_rises_together() -> None:
    made = [
        make_run("dense", s, **{"sharpness/train/lambda_max": 2.0**s, "plain/test/loss": 0.3 + s}) for s in range(6)
    ]
    found = correlate(made, LAMBDA_TRAIN, GAP)
    assert found is not None
    assert found.rho == pytest.approx(1) and found.within_heads == pytest.approx(1)
    assert found.low == pytest.approx(1) and found.num_runs == 6


def test_correlation_that_only_tells_heads_apart_vanishes_within_them() -> None:
    rng = np.random.default_rng(3)
    rng = np.random.default_rng(3)

    def metrics(level: float) -> dict[str, float]:
        lambda_max = level * math.exp(rng.normal() / 10)
        return {"sharpness/train/lambda_max": lambda_max, "plain/test/loss": level + rng.normal() / 100}

    levels = {"dense": 1.0, "soft": 10.0, "sparse": 100.0}
    runs = [make_run(head, seed, **metrics(level)) for head, level in levels.items() for seed in range(12)]
    found = correlate(runs, LAMBDA_TRAIN, GAP, num_resamples=200)
    assert found is not None
    assert found.rho > 0.8 and abs(found.within_heads) < 0.45
    assert correlate(runs[:3], LAMBDA_TRAIN, GAP) is None
