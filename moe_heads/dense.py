"""Dense head: one two-layer perceptron."""

from torch import Tensor, nn

from moe_heads.checks import check_at_least_one, check_shares
from moe_heads.flops import Flops
from moe_heads.head import Head
from moe_heads.routed_module import masked_mean
from moe_heads.routing import Routing

__all__ = ["Dense"]


class Dense(Head):
    """Two-layer perceptron D → H → ReLU → dropout → C.

    The defaults are those of the study (arXiv 2601.15021): 267,786 parameters for 512 features and 10 classes.

    Args:
        in_features: D.
        num_classes: C.
        width: H.
        dropout: Probability after the ReLU.

    Raises:
        ValueError: If a size is below 1 or the dropout outside [0, 1).

    Example:
        >>> import torch
        >>> from moe_heads import Dense
        >>> Dense(512, 10)(torch.randn(4, 512)).shape
        torch.Size([4, 10])
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__(in_features, num_classes)
        check_at_least_one(width=width)
        check_shares(dropout=dropout)
        self.width, self.dropout = width, dropout
        self.layers = nn.Sequential(
            nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, num_classes)
        )

    def classify(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the logits (B, C). A dense head has no routing."""
        logits = self.layers(x)
        return (masked_mean(logits, mask) if x.dim() == 3 else logits), None

    def count_flops(self, batch: int, tokens: int) -> Flops:
        """Count two matrix products, all of which are active."""
        flops = 2 * batch * tokens * self.width * (self.in_features + self.num_classes)
        return Flops(flops, flops)
