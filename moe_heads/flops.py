"""Theoretical arithmetic of a head."""

from dataclasses import dataclass

__all__ = ["Flops"]


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one forward pass in evaluation mode: two for each multiply-add of a matrix product.

    Biases, activations, softmax, top-k and the weighted sum of the experts' logits are not counted; together they are
    below 1 % for the study's heads.

    Attributes:
        total: As if every expert ran on every row.
        active: Of the experts that the router chooses, and of the router.
    """

    total: int
    active: int
