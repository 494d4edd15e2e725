import pytest

from moe_heads.analysis.inference_timing.plan import DEFAULT_SIZES, TimingPlan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, r"batch_sizes: expected a list of distinct positive integers, got \[\]"),
        ({"batch_sizes": [4, 0]}, r"batch_sizes\[1\]: expected an integer of at least 1, got 0"),
        ({"batch_sizes": [True]}, r"batch_sizes\[0\]: expected an integer of at least 1, got True"),
        ({"batch_sizes": [2, 2]}, r"batch_sizes: .* got \[2, 2\]"),
        ({"modes": ["fast"]}, r"modes: expected a list of some of 'eager', 'compiled', .*, got \['fast'\]"),
        ({"modes": "eager"}, "modes: expected a list of .*, got 'eager'"),
        ({"modes": ["eager", "eager"]}, "modes: expected a list of"),
        ({"num_runs": 0}, "num_runs: expected an integer of at least 1, got 0"),
        ({"warmup_runs": -1}, "warmup_runs: expected an integer of at least 0 or None, got -1"),
        ({"warmup_tolerance": 0.0}, "warmup_tolerance: expected a finite number above 0, got 0.0"),
        ({"seconds_per_size": -1}, "seconds_per_size: expected a finite number above 0, got -1"),
        ({"max_seconds": float("inf")}, "max_seconds: expected a finite number above 0, got inf"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimingPlan(**options)


def test_the_default_sizes_are_those_of_the_issue_and_the_rounds_at_least_seven() -> None:
    assert TimingPlan().batch_sizes == DEFAULT_SIZES == (1, 8, 32, 128, 256, 1024)
    assert TimingPlan().fewest_rounds == 7
    assert TimingPlan(num_runs=2).fewest_rounds == 3
    assert TimingPlan(num_runs=2, warmup_runs=5).fewest_rounds == 7
