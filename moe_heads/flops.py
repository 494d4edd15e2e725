"""Theoretical floating point operations of a head."""

from dataclasses import dataclass

__all__ = ["Flops"]


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one forward pass in evaluation mode, two per multiply-add of a matrix product.

    Biases, activations, softmax, top-k and the weighted sum of the experts' logits are not counted. Together they are
    below 1 % for the heads of the study.

    Attributes:
        total: Operations if every expert ran on every row.
        active: Operations of the router and of the experts that it chooses.
    """

    total: int
    active: int
