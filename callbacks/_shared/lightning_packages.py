"""Classes of Lightning under its two names, ``lightning.pytorch`` and ``pytorch_lightning``.

The two packages hold the same code in separate classes. An object of one is no instance of a class of the other.
"""

import sys
from typing import TypeVar

__all__ = ["own_class", "under_both_names"]

T = TypeVar("T")

_OTHER_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def under_both_names(*classes: type[T]) -> tuple[type[T], ...]:
    """Return classes of ``lightning``, each followed by its counterpart if that is loaded.

    A counterpart that is not loaded has no instances, so no second Lightning is imported here.

    Args:
        classes: Classes of ``lightning.pytorch`` or ``lightning.fabric``.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from moe_heads.callbacks._shared.lightning_packages import under_both_names
        >>> isinstance(LightningModule(), under_both_names(LightningModule, Trainer))
        True
    """
    return tuple(found for cls in classes for found in (cls, _counterpart(cls)) if found is not None)


def own_class(value: object, cls: type[T]) -> type[T] | None:
    """Return the class under the name that belongs to a value, None if the value is no instance of either."""
    return next((found for found in under_both_names(cls) if isinstance(value, found)), None)


def _counterpart(cls: type[T]) -> type[T] | None:
    for name, other in _OTHER_NAMES.items():
        if cls.__module__.startswith(name):
            module = sys.modules.get(cls.__module__.replace(name, other, 1))
            found: type[T] | None = getattr(module, cls.__name__, None)
            return found
    return None
