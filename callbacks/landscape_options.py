"""What is refused of the plane that a landscape callback is asked for, before any work starts."""

from collections.abc import Sequence
from typing import Any

from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.checks import check_at_least

__all__ = ["check_plane_points", "checked_plane_splits"]

# TensorBoard's mesh viewer addresses 65,536 vertices.
_MAX_PLANE_POINTS = 256


def check_plane_points(plane_points: Any) -> None:
    """Refuse a grid that cannot be drawn.

    Raises:
        ValueError: If a side has fewer than 3 or more than 256 points.
    """
    check_at_least(3, plane_points=plane_points)
    if plane_points > _MAX_PLANE_POINTS:
        raise ValueError(f"plane_points: expected 3 to {_MAX_PLANE_POINTS}, got {plane_points}")


def checked_plane_splits(plane_splits: Any, splits: Sequence[Split]) -> tuple[Split, ...]:
    """The splits whose plane is computed; by default the first.

    Raises:
        ValueError: If they are not among ``splits``.
    """
    wanted = splits[:1] if plane_splits is None else plane_splits
    if not isinstance(wanted, (list, tuple)) or any(split not in splits for split in wanted):
        raise ValueError(f"plane_splits: expected some of splits = {splits}, got {wanted!r}")
    return tuple(wanted)
