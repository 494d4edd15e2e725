"""New heads made from trained ones: a dense head becomes experts, experts are taken out."""

import copy
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from moe_heads.checks import check_at_least_one
from moe_heads.dense import Dense
from moe_heads.soft_moe import SoftMoE
from moe_heads.sparse_moe import SparseMoE

__all__ = ["ablate", "upcycle"]

MoEHead = TypeVar("MoEHead", SoftMoE, SparseMoE)

_NOT_FOR_UPCYCLING = {
    "in_features": "is the dense head's",
    "num_classes": "is the dense head's",
    "expert_width": "is the dense head's",
    "num_shared_experts": "would add to the dense head's logits",
}


def upcycle(dense_head: Dense, num_experts: int, **options: Any) -> SparseMoE:
    """A sparse head whose experts all start as copies of a trained dense head, the router being new.

    Sparse upcycling, Komatsuzaki et al., arXiv 2212.05055. With the noisy top-k and the bias-balanced router and k > 1
    the weights of a row's experts sum to one, so the new head starts with the logits of the dense one (dropout aside).
    Where the weight is a probability (k = 1, Switch, expert choice) it scales them, and the head has to learn its scale
    anew. The experts part in training because they see different rows.

    Args:
        dense_head: The head to copy; it is not changed.
        num_experts: E.
        **options: Further arguments of `SparseMoE`, such as ``k`` or ``router``; ``expert_width`` is the width of the
            dense head, and its dropout is the default.

    Returns:
        The head, with the device, dtype and mode of the dense one.

    Raises:
        ValueError: If the head is not a `Dense`, a shared expert is asked for, or an option is bad.

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
        raise ValueError(f"dense_head: expected a moe_heads.Dense, got {type(dense_head).__name__}")
    check_at_least_one(num_experts=num_experts)
    for name, reason in _NOT_FOR_UPCYCLING.items():
        if name in options:
            raise ValueError(f"{name}: {reason}; expected it absent, got {options[name]!r}")
    settings = {"dropout": dense_head.dropout, **options, "expert_width": dense_head.width}
    head = SparseMoE(dense_head.in_features, dense_head.num_classes, num_experts, **settings)
    # by name: a pruned or parametrized layer has other parameters than its weight
    sources = [getattr(dense_head.layers[index], name) for index in (0, 3) for name in ("weight", "bias")]
    head.to(sources[0].device, sources[0].dtype)
    with torch.no_grad():
        for target, source in zip(head.experts.stacks(), sources, strict=True):
            target.copy_(source.expand_as(target))
    return head.train(dense_head.training)


def ablate(head: MoEHead, experts: Sequence[int]) -> MoEHead:
    """A copy of a head without some of its experts, as if they had never been there.

    The router chooses among the others: softmax and normalization run over those that are left, and where experts
    choose, each takes its share of the rows anew. What the head loses by it is what the experts contribute. Hooks stay
    behind.

    Args:
        head: `SoftMoE` or `SparseMoE`; it is not changed.
        experts: Indices of the experts to take out.

    Returns:
        The smaller head.

    Raises:
        ValueError: If the head has no experts, an index is out of range or twice there, or fewer experts than a row
            needs would be left.

    Example:
        >>> from moe_heads import SparseMoE, ablate
        >>> ablate(SparseMoE(16, 3, num_experts=4), [1]).num_experts
        3
    """
    if not isinstance(head, (SoftMoE, SparseMoE)):
        raise ValueError(f"head: expected a SoftMoE or SparseMoE, got {type(head).__name__}")
    try:
        out = [operator.index(expert) for expert in experts]
    except TypeError:
        out = [-1]
    if len(set(out)) != len(out) or not all(0 <= expert < head.num_experts for expert in out):
        raise ValueError(f"experts: expected different integers from 0 to {head.num_experts - 1}, got {experts!r}")
    kept = [expert for expert in range(head.num_experts) if expert not in out]
    needed = max(1, head.k) if isinstance(head, SparseMoE) and head.router.k is not None else 1
    if len(kept) < needed:
        raise ValueError(f"experts: expected at least {needed} experts to be left; {len(kept)} would be of {experts!r}")
    if any(parametrize.is_parametrized(module) for module in head.modules()):
        raise ValueError("head: expected one without parametrizations; remove them first (torch.nn.utils.parametrize)")
    smaller = copy.deepcopy(head)
    smaller.num_experts = len(kept)
    smaller.router = head.router.keep(kept)
    smaller.experts = head.experts.keep(kept)
    return smaller
