"""New heads from trained ones: upcycling of a dense head, and removal of experts."""

import copy
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from moe_heads.checks import check_at_least_one
from moe_heads.dense import Dense
from moe_heads.moe_layer import MoELayer
from moe_heads.soft_moe import SoftMoE
from moe_heads.sparse_mixture import SparseMixture
from moe_heads.sparse_moe import SparseMoE

__all__ = ["ablate", "upcycle"]

MoEHead = TypeVar("MoEHead", SoftMoE, SparseMoE, MoELayer)

_NOT_FOR_UPCYCLING = {
    "in_features": "since the dense head sets it",
    "num_classes": "since the dense head sets it",
    "expert_width": "since the dense head sets it",
    "num_shared_experts": "since shared experts would add to the logits of the dense head",
}


def upcycle(dense_head: Dense, num_experts: int, **options: Any) -> SparseMoE:
    """Build a sparse head whose experts are copies of a trained dense head, with a new router.

    The method is sparse upcycling, Komatsuzaki et al., arXiv 2212.05055. With the noisy top-k and the bias-balanced
    router and k > 1 the weights of a row sum to one, so the new head starts with the logits of the dense one (up to
    dropout). Where the weight is a probability (k = 1, Switch, expert choice), it scales the logits, and the head has
    to relearn its scale. The experts diverge in training because they receive different rows.

    Args:
        dense_head: The head to copy. It is not changed.
        num_experts: E.
        **options: Further arguments of `SparseMoE`, such as ``k`` or ``router``. ``expert_width`` is the width of the
            dense head, and its dropout is the default.

    Returns:
        The head, with the device, dtype and mode of the dense one.

    Raises:
        ValueError: If the head is not a `Dense`, shared experts are requested, or an option is invalid.

    Example:
        >>> import torch
        >>> from moe_heads import Dense, upcycle
        >>> dense = Dense(16, 3, width=8).eval()
        >>> sparse = upcycle(dense, num_experts=4, k=2)
        >>> x = torch.randn(5, 16)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-6)
        True
    """
    if not isinstance(dense_head, Dense):
        raise ValueError(f"dense_head: expected a moe_heads.Dense, got {type(dense_head).__name__}.")
    check_at_least_one(num_experts=num_experts)
    for name, reason in _NOT_FOR_UPCYCLING.items():
        if name in options and not (name == "num_shared_experts" and options[name] == 0):
            raise ValueError(f"{name}: expected no value, {reason}, got {options[name]!r}. Remove it from the options.")
    fixed = {"expert_width": dense_head.width, "num_shared_experts": 0}
    settings = {"dropout": dense_head.dropout, **options, **fixed}
    head = SparseMoE(dense_head.in_features, dense_head.num_classes, num_experts, **settings)
    first, second = (layer for layer in dense_head.layers if isinstance(layer, nn.Linear))
    head.to(first.weight.device, first.weight.dtype)
    head.experts.copy_from(first, second)
    return head.train(dense_head.training)


def ablate(head: MoEHead, experts: Sequence[int]) -> MoEHead:
    """Return a copy of a head without some of its experts.

    The router chooses among the remaining experts: softmax and normalization run over those, and under expert choice
    each expert takes its share of the rows again. The accuracy that the copy loses is the contribution of the removed
    experts. Hooks are not copied.

    Args:
        head: `SoftMoE`, `SparseMoE` or `MoELayer`. It is not changed.
        experts: Indices of the experts to remove.

    Returns:
        The smaller head.

    Raises:
        ValueError: If the head has no experts, an index is out of range or repeated, or fewer experts remain than a
            row needs.

    Example:
        >>> from moe_heads import SparseMoE, ablate
        >>> ablate(SparseMoE(16, 3, num_experts=4), [1]).num_experts
        3
    """
    if not isinstance(head, (SoftMoE, SparseMixture)):
        raise ValueError(f"head: expected a SoftMoE, SparseMoE or MoELayer, got {type(head).__name__}.")
    try:
        out = [operator.index(expert) for expert in experts]
    except TypeError:
        out = [-1]
    if len(set(out)) != len(out) or not all(0 <= expert < head.num_experts for expert in out):
        raise ValueError(f"experts: expected different integers from 0 to {head.num_experts - 1}, got {experts!r}.")
    kept = [expert for expert in range(head.num_experts) if expert not in out]
    needed = max(1, head.k) if isinstance(head, SparseMixture) and head.router.k is not None else 1
    if len(kept) < needed:
        raise ValueError(
            f"experts: expected at least {needed} remaining experts, got {len(kept)}. Remove fewer experts than"
            f" {experts!r}."
        )
    if any(parametrize.is_parametrized(module) for module in head.modules()):
        raise ValueError(
            "head: expected a head without parametrizations, got a parametrized one. Remove them first with"
            " torch.nn.utils.parametrize.remove_parametrizations."
        )
    smaller = copy.deepcopy(head)
    smaller.num_experts = len(kept)
    smaller.router = head.router.keep(kept)
    smaller.experts = head.experts.keep(kept)
    return smaller
