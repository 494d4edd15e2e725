"""Argument checks. Each raises a ValueError that names the argument, the expected value and the actual value."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = [
    "check_at_least",
    "check_at_least_one",
    "check_balance",
    "check_callables",
    "check_choices",
    "check_flags",
    "check_not_negative",
    "check_option",
    "check_positive",
    "check_seed",
    "check_shares",
]


def check_at_least(least: int, *, or_none: bool = False, **counts: Any) -> None:
    """Check that the values are integers of at least ``least``, NumPy integers included, or None. Reject booleans."""
    _check_whole(Integral, least, or_none, counts)


def check_at_least_one(*, or_none: bool = False, **sizes: Any) -> None:
    """Check that the sizes are Python ints of at least 1, or None: modules and loaders accept no NumPy integers."""
    _check_whole(int, 1, or_none, sizes)


def check_positive(*, or_none: bool = False, **values: Any) -> None:
    """Check that the values are finite numbers above zero, or None."""
    for name, value in values.items():
        if not ((_is_number(value) and 0 < value < math.inf) or (or_none and value is None)):
            raise ValueError(f"{name}: expected a finite number above 0{_or_none(or_none)}, got {value!r}.")


def check_not_negative(**values: Any) -> None:
    """Check that the values are finite numbers of at least zero."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")


def check_shares(**shares: Any) -> None:
    """Check that the values are numbers in [0, 1)."""
    for name, share in shares.items():
        if not _is_number(share) or not 0 <= share < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {share!r}.")


def check_flags(**flags: Any) -> None:
    """Check that the values are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True or False, got {flag!r}.")


def check_callables(**functions: Any) -> None:
    """Check that the values are callable, or None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected a function or None, got {function!r}.")


def check_seed(seed: Any) -> None:
    """Check that the seed is an int from 0 to 2**63 - 1. A `torch.Generator` accepts no NumPy integers."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int from 0 to 2**63 - 1, got {seed!r}.")


def check_option(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that the value is one of the choices."""
    listed = tuple(choices)
    if not isinstance(value, str) or value not in listed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, listed))}, got {value!r}.")


def check_choices(name: str, values: Any, choices: Iterable[str]) -> None:
    """Check that the value is a list of some of the choices, without repetition."""
    allowed = tuple(choices)
    listed = values if isinstance(values, (list, tuple)) else ()
    known = [value for value in listed if isinstance(value, str) and value in allowed]
    if not listed or len(set(known)) < len(listed):
        some = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}: expected a list of some of {some}, each once, got {values!r}.")


def check_balance(balance: Mapping[str, float], terms: Sequence[str]) -> None:
    """Check that the router has every balance term, and that the coefficients are numbers of at least 0."""
    if not isinstance(balance, Mapping):
        raise ValueError(f"balance: expected a mapping such as {{{next(iter(terms))!r}: 0.2}}, got {balance!r}.")
    for name, coefficient in balance.items():
        check_option("balance", name, terms)
        check_not_negative(**{f"balance[{name!r}]": coefficient})


def _check_whole(kind: type, least: int, or_none: bool, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        is_whole = isinstance(value, kind) and not isinstance(value, bool)
        if not ((is_whole and value >= least) or (or_none and value is None)):
            raise ValueError(f"{name}: expected an integer of at least {least}{_or_none(or_none)}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _or_none(or_none: bool) -> str:
    return " or None" if or_none else ""
