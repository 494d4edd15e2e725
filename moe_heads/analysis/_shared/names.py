"""Checks of lists of names."""

from collections.abc import Collection, Sequence
from typing import TypeGuard

__all__ = ["are_names", "check_names"]


def are_names(names: object) -> TypeGuard[Sequence[str]]:
    """Return whether the object is a collection of strings of known length, and not a single string."""
    return isinstance(names, Collection) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def check_names(**names: object) -> None:
    """Check that each value is a collection of strings, or None."""
    for argument, value in names.items():
        if value is not None and not are_names(value):
            raise ValueError(f"{argument}: expected a list of names, got {value!r}.")
