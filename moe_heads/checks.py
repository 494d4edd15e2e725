"""Checks of constructor arguments: each raises a ValueError that names the argument, what was expected, what came."""

import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["check_at_least_one", "check_balance", "check_dropout", "check_option", "check_positive"]


def check_at_least_one(**sizes: int) -> None:
    """Refuse anything but whole numbers from 1 on."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1; got {value!r}")


def check_positive(**values: float) -> None:
    """Refuse anything but finite numbers above zero."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0; got {value!r}")


def check_dropout(dropout: float) -> None:
    """Refuse a probability outside [0, 1)."""
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1); got {dropout!r}")


def check_option(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices."""
    listed = tuple(choices)
    if value not in listed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, listed))}; got {value!r}")


def check_balance(balance: Mapping[str, float], terms: Sequence[str]) -> None:
    """Refuse a balance term that the router does not have, and a coefficient that is not a number from 0 on."""
    if not isinstance(balance, Mapping):
        raise ValueError(f"balance: expected a mapping such as {{{next(iter(terms))!r}: 0.2}}; got {balance!r}")
    for name, coefficient in balance.items():
        check_option("balance", name, terms)
        if not _is_number(coefficient) or not 0 <= coefficient < math.inf:
            raise ValueError(f"balance[{name!r}]: expected a finite coefficient of at least 0; got {coefficient!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
