"""Base class of the classifier heads: the call, its two output formats, and the input check."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, nn

from moe_heads.checks import check_at_least_one
from moe_heads.flops import Flops
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


class Head(nn.Module, ABC):
    """Base of the classifier heads: ``head(x) -> logits``, a drop-in replacement for a final `torch.nn.Linear`.

    Args:
        in_features: D, the size of the last dimension of the input.
        num_classes: C.
    """

    _version = 2
    """Format of the state dict, saved as metadata. Format 1 is the default of `torch.nn.Module`."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features, num_classes=num_classes)
        self.in_features = in_features
        self.num_classes = num_classes

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True]) -> HeadOutput: ...
    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | HeadOutput:
        """Compute the logits of the classes.

        Args:
            x: Pooled features (B, D), or tokens (B, T, D), whose logits are averaged over T.
            return_routing: Whether to return the balance loss and the routing as well.

        Returns:
            Logits (B, C), or a `HeadOutput` with ``return_routing``.

        Raises:
            ValueError: If x has a different shape or an integer dtype.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point numbers of shape (B, {self.in_features}) or (B, T, {self.in_features}),"
                f" got {x.dtype} of shape {tuple(x.shape)}. Flatten or cast the features, or build the head with their"
                " size."
            )
        logits, routing = self.classify(x)
        if not return_routing:
            return logits
        return HeadOutput(logits, logits.new_zeros(()) if routing is None else routing.aux_loss, routing)

    @abstractmethod
    def classify(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """Compute the logits (B, C) and the routing of an input whose shape was checked."""

    @abstractmethod
    def count_flops(self, batch: int, tokens: int) -> Flops:
        """Count the operations for sizes that were checked. ``tokens`` is 1 for pooled features."""

    def flops(self, batch: int = 1, tokens: int = 1) -> Flops:
        """Count the theoretical floating point operations of a forward pass, total and active. See `Flops`.

        Args:
            batch: B.
            tokens: T, which is 1 for pooled features.

        Raises:
            ValueError: If a size is below 1.

        Example:
            >>> from moe_heads import Dense, SparseMoE
            >>> Dense(512, 10).flops(batch=32)
            Flops(total=17104896, active=17104896)
            >>> SparseMoE(512, 10).flops(batch=32)
            Flops(total=17367040, active=4538368)
        """
        check_at_least_one(batch=batch, tokens=tokens)
        return self.count_flops(batch, tokens)

    def stages(self, x: Tensor) -> Mapping[str, Callable[[], object]]:
        """Return functions that repeat the work of a forward pass outside the submodules, by name, for timing.

        A sparse head has "dispatch", which gathers the rows of each expert, and "combine", which sums the logits per
        row. Either is absent where the dispatch path fuses it with the matrix products of the experts. Other heads
        return an empty mapping.

        Args:
            x: Input of the head.
        """
        return {}

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters used to evaluate one row."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version")
        if version is not None and version > self._version:
            error_msgs.append(
                f"{prefix or 'head'}: expected a state dict of format {self._version} or older, got format {version},"
                " which a newer moe_heads wrote. Upgrade moe_heads."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Return the sizes of the head."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"parameters={total:,}, active={self.num_active_parameters:,}"
        )
