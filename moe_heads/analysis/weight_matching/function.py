"""Match the units, experts and router rows of a network with those of another one."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis.weight_matching.check import LossCheck
from moe_heads.analysis.weight_matching.descent import match
from moe_heads.analysis.weight_matching.group import Group, Orders, Tensors
from moe_heads.analysis.weight_matching.result import MatchedGroup, WeightMatch
from moe_heads.analysis.weight_matching.tensors import checked_tensors, with_aliases
from moe_heads.analysis.weight_matching.tracing import find_groups
from moe_heads.checks import check_at_least

__all__ = ["match_weights", "permuted"]


def match_weights(
    model: nn.Module,
    other: nn.Module | Mapping[str, Tensor],
    loss_fn: LossFn,
    batch: Batch,
    *,
    num_restarts: int = 3,
    seed: int = 0,
) -> WeightMatch:
    """Permute the units, experts and router rows of a network so that it comes close to another one.

    The permutations leave the network's function unchanged. They are derived from the functions that the loss calls
    (linear layers, convolutions, batch and layer norm, activations, pooling, reshapes and residual additions) and from
    the mixtures of this package. Each group of permutations is checked on the loss of the batch, in float64 where the
    loss can be computed in it. A group that changes the loss keeps its order.

    Args:
        model: The first network, on any device. It is not changed.
        other: The second network, or its parameters and buffers by name.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch: A batch on the device of the model.
        num_restarts: Number of additional starts from random permutations.
        seed: Seed of these starts and of the checks.

    Returns:
        The permuted tensors of the second network, and what was permuted.

    Raises:
        ValueError: If the tensors have other names or shapes than those of the model, or are not finite.

    Example:
        >>> import torch
        >>> from moe_heads import Dense
        >>> from moe_heads.analysis import match_weights
        >>> first, second = Dense(4, 3, width=8), Dense(4, 3, width=8)
        >>> batch = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss_fn = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])
        >>> matched = match_weights(first, second, loss_fn, batch)
        >>> matched.distance_after <= matched.distance_before
        True
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed)
    check_at_least(0, num_restarts=num_restarts)
    other = checked_tensors(model, other)
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    second = {name: other[name] for name in parameters}
    if bad := [name for name, one in parameters.items() if not (_is_finite(one) and _is_finite(second[name]))]:
        raise ValueError(f"weights: expected finite numbers, got nan or infinity in {bad[0]}. Check the checkpoint.")
    with analysis_mode(model, seed):
        groups = find_groups(model, loss_fn, batch)
        check = LossCheck(model, loss_fn, batch, other)
        failed = {group.name: reason for group in groups if (reason := check.failure(group, seed))}
        kept = [group for group in groups if group.name not in failed]
        matching = match(kept, parameters, second, num_restarts, seed)
        moved = permuted(kept, other, matching.orders)
        reason = check.difference(moved)
        if reason:
            failed |= {group.name: f"all groups together: {reason}" for group in kept}
            kept, moved = [], dict(other)
    orders = {group.name: matching.orders[group.name] for group in kept}
    touched = {name for group in kept for name in group.names}
    return WeightMatch(
        tensors=with_aliases(model, moved),
        groups=tuple(MatchedGroup(group.name, group.moved(orders[group.name])) for group in kept),
        orders=orders,
        failed=failed,
        unmatched=tuple(name for name in parameters if name not in touched and parameters[name].dim() > 1),
        distance_before=_distance(parameters, second),
        distance_after=_distance(parameters, {name: moved[name] for name in parameters}),
        loss_changed_by=check.largest_change,
    )


def permuted(groups: Sequence[Group], tensors: Tensors, orders: Mapping[str, Orders]) -> dict[str, Tensor]:
    """Return the tensors of a network in the orders of its groups."""
    found = dict(tensors)
    for group in groups:
        found.update(group.apply(found, orders[group.name]))
    return found


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _distance(first: Tensors, second: Tensors) -> float:
    pairs = [(tensor.double(), second[name].to(tensor.device).double()) for name, tensor in first.items()]
    return math.sqrt(sum(float((one - other).square().sum()) for one, other in pairs))
