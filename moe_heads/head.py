"""Base class of the classifier heads: the call, its two output formats, and padded tokens."""

from abc import abstractmethod
from typing import Literal, NamedTuple, overload

from torch import Tensor

from moe_heads.checks import check_at_least_one, check_flags
from moe_heads.routed_module import RoutedModule
from moe_heads.routing import Routing

__all__ = ["Head", "HeadOutput"]


class HeadOutput(NamedTuple):
    """Output of ``head(x, return_routing=True)``, with the same three fields for every head.

    Attributes:
        logits: (B, C).
        aux_loss: Balance loss to add to the task loss, scalar. Zero for `Dense`.
        routing: Decisions of the router. None for `Dense`.
    """

    logits: Tensor
    aux_loss: Tensor
    routing: Routing | None


class Head(RoutedModule):
    """Base of the classifier heads: ``head(x) -> logits``, a drop-in replacement for a final `torch.nn.Linear`.

    Args:
        in_features: D, the size of the last dimension of the input.
        num_classes: C.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features)
        check_at_least_one(num_classes=num_classes)
        self.num_classes = num_classes

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = ..., *, mask: Tensor | None = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True], *, mask: Tensor | None = ...) -> HeadOutput: ...
    def forward(self, x: Tensor, return_routing: bool = False, *, mask: Tensor | None = None) -> Tensor | HeadOutput:
        """Compute the logits of the classes.

        Args:
            x: Pooled features (B, D), or tokens (B, T, D), whose logits are averaged over T.
            return_routing: Whether to return the balance loss and the routing as well.
            mask: True for real tokens, False for padding, (B, T), bool. The output is that of the real tokens alone for
                any content of the padding, which counts in no balance loss and no statistic. For pooled features the
                mask is (B,). The logits of a sample without a real token are zero, without a gradient.

        Returns:
            Logits (B, C), or a `HeadOutput` with ``return_routing``.

        Raises:
            ValueError: If x has a different shape or an integer dtype, the mask has a different shape or dtype, or the
                router does not take a mask.
        """
        check_flags(return_routing=return_routing)
        x = self.prepared(x, mask, f"(B, {self.in_features}) or (B, T, {self.in_features})", max_dim=3)
        logits, routing = self.classify(x, mask)
        if mask is not None and x.dim() == 2:
            logits = logits.masked_fill(~mask.unsqueeze(-1), 0)
        if not return_routing:
            return logits
        return HeadOutput(logits, logits.new_zeros(()) if routing is None else routing.aux_loss, routing)

    @abstractmethod
    def classify(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Compute the logits (B, C) and the routing of an input that was checked, with zeros in padded tokens.

        The logits of a padded row of pooled features (B, D) are ignored.
        """

    @property
    def _kind(self) -> str:
        return "head"

    def extra_repr(self) -> str:
        """Return the sizes of the head."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, {super().extra_repr()}"
