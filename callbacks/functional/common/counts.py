"""Whether an argument is a whole number."""

from numbers import Integral
from typing import Any

__all__ = ["is_count"]


def is_count(value: Any, least: int) -> bool:
    """Whether this is an integer, NumPy's too, of at least ``least``. True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least
