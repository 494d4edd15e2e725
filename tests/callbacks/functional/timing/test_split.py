import math

import pytest

from moe_heads.callbacks.functional.timing.split import split


def test_the_last_part_is_what_the_others_leave_and_all_add_up() -> None:
    rounds = {name: [[ms]] * 8 for name, ms in {"router": 2.0, "dispatch": 1.0, "combine": 0.5}.items()}
    parts = split(32, "head", [[10.0]] * 8, rounds, "experts", seed=0)
    assert [(part.name, part.ms, part.how) for part in parts] == [
        ("router", 2.0, "timed alone"),
        ("dispatch", 1.0, "timed alone"),
        ("combine", 0.5, "timed alone"),
        ("experts", 6.5, "by difference"),
    ]
    assert sum(part.ms for part in parts) == 10
    assert all((part.batch_size, part.whole) == (32, "head") for part in parts)
    # nothing varies within the run: 2 % of each part are what is left
    assert (parts[0].low_ms, parts[0].high_ms) == pytest.approx((1.96, 2.04))
    error = 0.02 * math.sqrt(10**2 + 2**2 + 1**2 + 0.5**2)
    assert (parts[-1].low_ms, parts[-1].high_ms) == pytest.approx((6.5 - error, 6.5 + error))


def test_the_error_of_a_difference_is_that_of_both() -> None:
    whole = [[10.0 + i % 3] for i in range(12)]
    *_, rest = split(1, "model", whole, {"backbone": [[9.0 + i % 2] for i in range(12)]}, "rest", seed=0)
    # the whole alone varies by 2, the backbone by 1
    assert rest.ms == 1.5
    assert 0 < rest.low_ms < rest.ms < rest.high_ms < 3
