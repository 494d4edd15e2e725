"""Total and active parameters of a head, and heads of equal capacity."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from moe_heads.checks import check_at_least_one, check_option, check_positive
from moe_heads.dense import Dense
from moe_heads.head import Head
from moe_heads.routed_module import RoutedModule
from moe_heads.soft_moe import SoftMoE
from moe_heads.sparse_moe import SparseMoE

__all__ = ["Capacity", "HeadKind", "capacity", "match_capacity"]

HeadKind = Literal["dense", "soft", "sparse"]

_KINDS: dict[str, tuple[type[Head], str]] = {
    "dense": (Dense, "width"),
    "soft": (SoftMoE, "expert_width"),
    "sparse": (SparseMoE, "expert_width"),
}


@dataclass(frozen=True)
class Capacity:
    """Number of parameters.

    Attributes:
        total: Number of all parameters.
        active: Number of the parameters used to evaluate one row. For a sparse head these are the gate, k experts and
            the shared ones.
    """

    total: int
    active: int


def capacity(module: nn.Module) -> Capacity:
    """Count the parameters of a head, or of a model that contains heads or layers: in total, and active for one row.

    Example:
        >>> from moe_heads import SparseMoE, capacity
        >>> capacity(SparseMoE(512, 10))
        Capacity(total=338924, active=138032)
    """
    total = _num_parameters(module)
    routed = [child for child in module.modules() if isinstance(child, RoutedModule)]
    idle = sum(_num_parameters(child) - child.num_active_parameters for child in routed)
    return Capacity(total, total - idle)


def match_capacity(
    kind: HeadKind,
    in_features: int,
    num_classes: int,
    *,
    total: int | None = None,
    active: int | None = None,
    tolerance: float = 0.02,
    **options: Any,
) -> Head:
    """Build the head whose capacity is closest to a target, by choosing its width.

    Args:
        kind: "dense", "soft" or "sparse".
        in_features: D.
        num_classes: C.
        total: Target for the total number of parameters. Pass either this or ``active``.
        active: Target for the number of active parameters.
        tolerance: Largest accepted relative deviation. The default is 2 %, because the three heads of the study differ
            by 3 %.
        **options: Further arguments of the head, such as ``num_experts`` or ``k``.

    Returns:
        The head.

    Raises:
        ValueError: If no width comes within the tolerance (the message names the closest one), both or neither of the
            targets are given, the width itself is among the options, or an option is invalid.

    Example:
        >>> from moe_heads import Dense, capacity, match_capacity
        >>> reference = capacity(Dense(512, 10)).total
        >>> head = match_capacity("sparse", 512, 10, total=reference)
        >>> head.expert_width, capacity(head).total - reference
        (50, -2082)
    """
    check_option("kind", kind, get_args(HeadKind))
    check_positive(tolerance=tolerance)
    if (total is None) == (active is None):
        raise ValueError(
            f"total, active: expected exactly one of the two, got total={total!r}, active={active!r}. Remove one of"
            " them, or pass capacity(head).total of a reference head as total."
        )
    measure = "total" if active is None else "active"
    target = total if active is None else active
    assert target is not None
    wanted: dict[str, Any] = {measure: target}
    check_at_least_one(**wanted)
    head_class, width_name = _KINDS[kind]
    if width_name in options:
        raise ValueError(
            f"{width_name}: expected no value, since match_capacity chooses it, got {options[width_name]!r}. Remove it"
            " from the options."
        )

    def size(width: int) -> int:
        with torch.device("meta"):
            head = head_class(in_features, num_classes, **{width_name: width}, **options)
        return int(getattr(capacity(head), measure))

    # the number of parameters is affine in the width
    smallest = size(1)
    # (the slope is taken over many units because a mean number of active experts is rounded)
    width = max(1, 1 + round((target - smallest) / ((size(1001) - smallest) / 1000)))
    nearest = size(width)
    if abs(nearest - target) > tolerance * target:
        raise ValueError(
            f"{measure}: expected a number of parameters within {tolerance:.1%} of a {kind} head, got {target:,}. The"
            f" closest head has {nearest:,} ({nearest / target - 1:+.1%}) at {width_name}={width}: change the target or"
            " raise the tolerance."
        )
    return head_class(in_features, num_classes, **{width_name: width}, **options)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
