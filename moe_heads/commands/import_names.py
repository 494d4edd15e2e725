"""Objects by import name, such as ``my.module:Model``."""

import importlib
import os
import sys
from typing import Any

from moe_heads.commands.errors import CommandError, one_sentence

__all__ = ["import_object"]


def import_object(option: str, name: str) -> Any:
    """Import an object. Modules in the current directory are found.

    Args:
        option: Name of the option, for messages.
        name: ``module:object``; the object may be an attribute, ``module:Class.method``.

    Raises:
        CommandError: If the module cannot be imported or has no such object.
    """
    module_name, colon, path = name.partition(":")
    if not module_name or not colon or not path:
        raise CommandError(f"{option}: expected module:object, such as my.module:Model, got {name!r}.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(
            f"{option}: expected a module that can be imported from {here}, got {module_name!r}, which failed with"
            f" {type(error).__name__}: {one_sentence(error)}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise CommandError(
                f"{option}: expected an object of the module {module_name}, got {path!r}, which it lacks."
            )
        found = getattr(found, part)
    return found
