"""Masks of the real tokens of a batch, so that padding counts in no statistic.

Shapes: B samples, T tokens, N rows of a router.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.routing import Routing

__all__ = ["MaskFn", "TokenMasks"]

MaskFn = Callable[[Batch], Tensor | None]
"""``mask_fn(batch) -> mask (B, T)``, bool, True for real tokens, or None for a batch without padding."""

_FOUND = "attention_mask"
_OF_DECODER = "decoder_attention_mask"


@dataclass(frozen=True)
class _BatchMask:
    """Masks of one batch: of the tokens, and of those of the decoder if the model has an encoder too."""

    tokens: Tensor | None
    decoder: Tensor | None


class TokenMasks:
    """Masks of the tokens for the statistics of the routers, from a function or from the entry "attention_mask".

    Only the statistics use them: what the model computes is unchanged. A routing that has a mask keeps it.

    Args:
        mask_fn: Function from a batch to its mask. None for the entry or attribute "attention_mask" of the batch, if it
            is a tensor of two dimensions (1 or True for a token). Routers below a module called "decoder", in a model
            that also has an "encoder", take "decoder_attention_mask".

    Attributes:
        unused: Names of routers with another number of rows than a mask that was found, with the shape of the mask and
            the number of rows. Their padding counts.
    """

    def __init__(self, mask_fn: MaskFn | None) -> None:
        self._mask_fn = mask_fn
        self._current = _BatchMask(None, None)
        self.unused: dict[str, tuple[tuple[int, ...], int]] = {}

    def begin(self, batch: Batch) -> None:
        """Read the mask of a batch.

        Raises:
            ValueError: If ``mask_fn`` returns something else than a bool tensor (B, T) or None, or the mask differs in
                its shape from the entry "input_ids" of the batch.
        """
        if self._mask_fn is None:
            self._current = _BatchMask(_readable(_entry(batch, _FOUND)), _readable(_entry(batch, _OF_DECODER)))
            return
        mask = self._mask_fn(batch)
        if mask is not None:
            _check(mask, batch)
        self._current = _BatchMask(mask, mask)

    def applied(self, routings: Mapping[str, Iterable[Routing]]) -> dict[str, list[Routing]]:
        """Return the routings of the batch, by the name of the router, with the mask of their rows.

        Raises:
            ValueError: If ``mask_fn`` was given, and the rows of a router are neither the tokens of its mask, nor the
                real ones of them, nor one for each sample.
        """
        has_both = all(any(part in _parts(name) for name in routings) for part in ("encoder", "decoder"))
        found: dict[str, list[Routing]] = {}
        for name, passes in routings.items():
            of_decoder = has_both and "decoder" in _parts(name)
            mask = self._current.decoder if of_decoder else self._current.tokens
            found[name] = [self._masked(name, routing, mask) for routing in passes]
        return found

    def _masked(self, name: str, routing: Routing, mask: Tensor | None) -> Routing:
        if mask is None or routing.mask is not None:
            return routing
        num_rows = len(routing.logits)
        if num_rows == mask.numel():
            of_rows = mask.flatten().to(routing.logits.device)
            return replace(routing, mask=of_rows, rows_per_sample=mask.shape[1])
        # one row for each sample, or only the rows of real tokens
        if num_rows == len(mask) or num_rows == int(mask.sum()):
            return routing
        if self._mask_fn is not None:
            raise ValueError(
                f"mask_fn: expected a mask of the tokens that router {name!r} routes, got {tuple(mask.shape)} for"
                f" {num_rows} rows."
            )
        self.unused.setdefault(name, (tuple(mask.shape), num_rows))
        return routing


def _entry(batch: Batch, name: str) -> Any:
    """Return the entry or attribute of a batch, or of one of the parts of a tuple or list."""
    if isinstance(batch, Tensor) or batch is None:
        return None
    if isinstance(batch, Mapping):
        return batch.get(name)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, name):
        found = [_entry(part, name) for part in batch if not isinstance(part, (tuple, list))]
        return next((value for value in found if value is not None), None)
    return getattr(batch, name, None)


def _readable(mask: Any) -> Tensor | None:
    """Return a mask (B, T) as bool, or None for anything else, such as the summands of attention."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_complex():
        return None
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask if mask.dtype == torch.bool else mask != 0


def _check(mask: Any, batch: Batch) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        got = f"{tuple(mask.shape)}, {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask_fn: expected a bool tensor (B, T), True for real tokens, got {got}. For a padding mask of torch,"
            " which is True for padding, return ~mask."
        )
    ids = _entry(batch, "input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape != mask.shape:
        raise ValueError(
            f"mask_fn: expected a mask of the shape {tuple(ids.shape)} of input_ids, got {tuple(mask.shape)}."
        )
    try:
        num_samples = batch_size(batch)
    except ValueError:  # the number of samples is unknown
        return
    if len(mask) != num_samples:
        raise ValueError(
            f"mask_fn: expected a mask of the {num_samples} samples of the batch, got {tuple(mask.shape)}."
        )


def _parts(name: str) -> list[str]:
    return name.split(".")
