"""Base class of heads and layers: input check, operation counts, and the format of state dicts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.checks import check_at_least_one
from moe_heads.flops import Flops

__all__ = ["RoutedModule", "mask_error", "masked_mean"]


class RoutedModule(nn.Module, ABC):
    """Base of the heads and layers, which compute with features (..., D) and may have a router.

    Args:
        in_features: D, the size of the last dimension of the input.
    """

    _version = 3
    """Format of the state dict, saved as metadata. Format 1 is the default of `torch.nn.Module`."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features)
        self.in_features = in_features

    def prepared(self, x: Tensor, mask: Tensor | None, shapes: str, max_dim: int | None = None) -> Tensor:
        """Check the input, and return x with zeros in padded rows.

        Args:
            x: Features.
            mask: Mask of the real rows, or None.
            shapes: Allowed shapes, for the message.
            max_dim: Largest number of dimensions of x.

        Raises:
            ValueError: If x has another shape or an integer dtype, or the mask does not fit it.
        """
        has_size = x.dim() >= 2 and (max_dim is None or x.dim() <= max_dim) and x.shape[-1] == self.in_features
        if not has_size or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point numbers of shape {shapes}, got {x.dtype} of shape {tuple(x.shape)}."
                f" Flatten or cast the features, or build the {self._kind} with their size."
            )
        if mask is None:
            return x
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise mask_error(str(tuple(x.shape[:-1])), mask)
        if mask.device != x.device:
            raise ValueError(f"mask: expected the device of x, {x.device}, got {mask.device}. Move the mask to it.")
        return x.masked_fill(~mask.unsqueeze(-1), 0)

    @property
    def _kind(self) -> str:
        """Return the word for the module in messages."""
        return "layer"

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
            Flops(total=21643264, active=8814592)
        """
        check_at_least_one(batch=batch, tokens=tokens)
        return self.count_flops(batch, tokens)

    def stages(self, x: Tensor) -> Mapping[str, Callable[[], object]]:
        """Return functions that repeat the work of a forward pass outside the submodules, by name, for timing.

        A sparse head has "dispatch", which gathers the rows of each expert, and "combine", which sums the outputs per
        row. Either is absent where the dispatch path fuses it with the matrix products of the experts. Other heads
        return an empty mapping.

        Args:
            x: Input of the module.
        """
        return {}

    def extra_repr(self) -> str:
        """Return the numbers of parameters."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return f"parameters={total:,}, active={self.num_active_parameters:,}"

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
                f"{prefix or self._kind}: expected a state dict of format {self._version} or older, got format"
                f" {version}, which a newer moe_heads wrote. Upgrade moe_heads."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def mask_error(shape: str, mask: object) -> ValueError:
    """Return the error for a mask of another type, dtype or shape than expected."""
    got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    return ValueError(
        f"mask: expected bool of shape {shape}, True for real tokens, got {got}. Convert an attention mask of zeros and"
        " ones with .bool(), and invert a key_padding_mask of torch."
    )


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens, (B, C), of values (B, T, C). It is zero for a sample without any.

    Args:
        values: Values of the tokens.
        mask: Real tokens, (B, T), bool. None if all are real.
    """
    if mask is None:
        return values.mean(1)
    # in full precision: the sum over many tokens, and their number, may exceed the range of float16
    wide = torch.promote_types(values.dtype, torch.float32)
    total = values.masked_fill(~mask.unsqueeze(-1), 0).sum(1, dtype=wide)
    return (total / mask.sum(1, keepdim=True).clamp_min(1)).to(values.dtype)
