"""Checks of the arguments that several analyses share, by name: a name has one meaning in all of them."""

from typing import Any

from torch import nn

from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.checks import check_seed

__all__ = ["check_arguments"]

_TYPES: dict[str, tuple[type, str]] = {
    "model": (nn.Module, "a torch.nn.Module"),
    "progress": (Progress, "a Progress or None"),
    "ranks": (Ranks, "a Ranks or None"),
}

_FUNCTIONS = {
    "loss_fn": "loss_fn(model, batch) -> scalar",
    "forward_fn": "forward_fn(model, batch) -> output",
    "label_fn": "label_fn(batch) -> labels",
    "image_fn": "image_fn(batch) -> images",
    "accuracy_fn": "accuracy_fn(model, batch) -> scalar, or None",
    "batch_size_fn": "batch_size_fn(batch) -> int, or None",
    "batch_weight_fn": "batch_weight_fn(batch) -> number, or None",
}


def check_arguments(**arguments: Any) -> None:
    """Check the types of arguments.

    Args:
        arguments: Values by name. Their names decide what is expected: "model", "progress", "ranks", "seed", or one of
            the functions of an analysis.

    Raises:
        ValueError: If a value has a wrong type.

    Example:
        >>> check_arguments(seed=0, loss_fn=3)
        Traceback (most recent call last):
        ValueError: loss_fn: expected a function loss_fn(model, batch) -> scalar, got 3.
    """
    for name, value in arguments.items():
        if name == "seed":
            check_seed(value)
            continue
        if name in _TYPES:
            kind, expected = _TYPES[name]
            is_right = isinstance(value, kind)
        else:
            expected = f"a function {_FUNCTIONS[name]}"
            is_right = callable(value)
        if not is_right and not (value is None and expected.endswith("None")):
            raise ValueError(f"{name}: expected {expected}, got {value!r}.")
