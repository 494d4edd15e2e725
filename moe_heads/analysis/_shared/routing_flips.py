"""Fraction of samples that are routed to different experts than at a reference point."""

import math

import torch
from torch import Tensor

from moe_heads.routing import Routing, RoutingCollection

__all__ = ["Choices", "choices_of", "flip_share"]

Choices = list[Tensor]
"""Selected experts for each pass of a router over a batch: bool, (samples, rows of a sample · E)."""


def choices_of(collection: RoutingCollection) -> Choices:
    """Return the choices of every collected pass, in the order of the heads' names in the model."""
    return [_choice(routing) for routings in collection.routings.values() for routing in routings]


def flip_share(choices: Choices, reference: Choices) -> float:
    """Return the fraction of samples with a different set of experts than in ``reference``, averaged over the passes.

    A sample of several tokens flips when one of its tokens does. The order of the experts within a set is ignored.

    Args:
        choices: Choices at the point.
        reference: Choices at the reference point for the same batches.

    Returns:
        The fraction, 0 to 1; nan if no router ran.

    Raises:
        ValueError: If the two differ in shape.
    """
    shapes, expected = [c.shape for c in choices], [c.shape for c in reference]
    if shapes != expected:
        raise ValueError(
            "model: expected the same routed rows at every point of the landscape, got shapes "
            f"{[tuple(s) for s in shapes]} instead of {[tuple(s) for s in expected]} at the center."
        )
    if not reference:
        return math.nan
    flipped = [(here != there).any(1).to(torch.float64).sum() for here, there in zip(choices, reference, strict=True)]
    return float(torch.stack(flipped).sum()) / sum(len(c) for c in reference)


def _choice(routing: Routing) -> Tensor:
    # a row without finite logits selects no expert
    selected = routing.selected & routing.valid.unsqueeze(-1)
    return selected.reshape(-1, routing.rows_per_sample * routing.num_experts)
