"""Argument checks: types of numbers and boundary values that the tests of the callers do not cover."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_heads.checks import (
    check_at_least,
    check_at_least_one,
    check_choices,
    check_flags,
    check_not_negative,
    check_option,
    check_positive,
    check_seed,
    check_shares,
)


def test_the_edges_of_what_is_taken() -> None:
    check_at_least(3, count=np.int64(3))
    check_at_least(3, or_none=True, count=None)
    check_at_least_one(or_none=True, size=None)
    check_positive(or_none=True, value=None, other=np.float32(0.5))
    check_at_least(0, count=0)
    check_not_negative(value=0)
    check_shares(zero=0, most=math.nextafter(1, 0))
    check_seed(0)
    check_seed(2**63 - 1)
    check_choices("splits", ("train", "test"), ["test", "train"])


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_at_least(2, first=2, count=1), "count: expected an integer of at least 2, got 1"),
        (lambda: check_at_least(0, count=False), "count: expected an integer of at least 0, got False"),
        (lambda: check_at_least(0, count="2"), "count: expected an integer of at least 0, got '2'"),
        (lambda: check_at_least(0, count=2.0), r"count: expected an integer of at least 0, got 2\.0"),
        (lambda: check_at_least(0, count=None), "count: expected an integer of at least 0, got None"),
        (lambda: check_at_least_one(width=np.int64(3)), "width: expected an integer of at least 1, got"),
        (lambda: check_at_least(2, or_none=True, count=1), "count: expected an integer of at least 2 or None, got 1"),
        (lambda: check_at_least_one(or_none=True, size=0), "size: expected an integer of at least 1 or None, got 0"),
        (lambda: check_positive(or_none=True, value=0), "value: expected a finite number above 0 or None, got 0"),
        (lambda: check_option("mode", np.array(["a", "b"]), "ab"), "mode: expected one of 'a', 'b', got array"),
        (lambda: check_positive(value=0), "value: expected a finite number above 0, got 0"),
        (lambda: check_positive(value=math.nan), "value: expected a finite number above 0, got nan"),
        (lambda: check_positive(value=math.inf), "value: expected a finite number above 0, got inf"),
        (lambda: check_positive(value=True), "value: expected a finite number above 0, got True"),
        (lambda: check_positive(value=1j), "value: expected a finite number above 0, got 1j"),
        (lambda: check_not_negative(value=-0.5), "value: expected a finite number of at least 0, got -0.5"),
        (lambda: check_not_negative(value="0"), "value: expected a finite number of at least 0, got '0'"),
        (lambda: check_shares(share=1), r"share: expected a number in \[0, 1\), got 1"),
        (lambda: check_shares(share="half"), r"share: expected a number in \[0, 1\), got 'half'"),
        (lambda: check_flags(on=1), "on: expected True or False, got 1"),
        (lambda: check_seed(-1), r"seed: expected an int from 0 to 2\*\*63 - 1, got -1"),
        (lambda: check_seed(2**63), "seed: expected an int from 0 to .*, got 9223372036854775808"),
        (lambda: check_seed(np.int64(1)), "seed: expected an int from 0 to"),
        (lambda: check_seed(True), "seed: expected an int from 0 to .*, got True"),
        (lambda: check_option("mode", ["a"], "ab"), r"mode: expected one of 'a', 'b', got \['a'\]"),
        (lambda: check_choices("modes", "a", "ab"), "modes: expected a list of some of 'a', 'b', each once, got 'a'"),
        (lambda: check_choices("modes", [], "ab"), r"modes: expected a list of some of 'a', 'b', each once, got \[\]"),
        (lambda: check_choices("modes", ["a", "a"], "ab"), r"modes: .* got \['a', 'a'\]"),
        (lambda: check_choices("modes", ["a", ["b"]], "ab"), r"modes: .* got \['a', \['b'\]\]"),
    ],
)
def test_what_is_refused(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check()
