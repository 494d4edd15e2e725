"""What is refused of the options of the loss landscape callback, before any work starts."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_heads.callbacks.functional.common.counts import is_count
from moe_heads.callbacks.trainer_access import Split

__all__ = ["check_landscape_options", "checked_plane_splits"]

# TensorBoard's mesh viewer addresses 65,536 vertices.
_MAX_PLANE_POINTS = 256


def check_landscape_options(
    counts: Mapping[str, tuple[Any, int]],
    reaches: Mapping[str, Any],
    choices: Mapping[str, tuple[Any, tuple[str, ...]]],
    flags: Mapping[str, Any],
    plane_points: Any,
) -> None:
    """Refuse options of a wrong kind or out of range.

    Args:
        counts: Whole numbers by name, each with the least that it may be.
        reaches: Largest coordinates by name.
        choices: Words by name, each with those that are known.
        flags: Options that are true or false, by name.
        plane_points: Option of `LossLandscapeCallback`.

    Raises:
        ValueError: Names the option, what was expected and what came.
    """
    for name, (count, least) in counts.items():
        if not is_count(count, least):
            raise ValueError(f"{name}: expected at least {least}; got {count}")
    if not is_count(plane_points, 3) or plane_points > _MAX_PLANE_POINTS:
        raise ValueError(f"plane_points: expected 3 to {_MAX_PLANE_POINTS}; got {plane_points}")
    for name, value in reaches.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a finite number above 0; got {value!r}")
    for name, (word, known) in choices.items():
        if word not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}; got {word!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True or False; got {flag!r}")


def checked_plane_splits(plane_splits: Any, splits: Sequence[Split]) -> tuple[Split, ...]:
    """The splits whose plane is computed; by default the first.

    Raises:
        ValueError: If they are not among ``splits``.
    """
    wanted = splits[:1] if plane_splits is None else plane_splits
    if not isinstance(wanted, (list, tuple)) or set(wanted) - set(splits):
        raise ValueError(f"plane_splits: expected some of splits = {splits}; got {wanted!r}")
    return tuple(wanted)
