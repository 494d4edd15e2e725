"""Masks of the real tokens of a batch, so that padding counts in no statistic.

Shapes: B samples, T tokens, N rows of a router.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.routing import Routing
from moe_heads.routing.padding import is_time_first, mask_of_tokens

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
            that also has an "encoder", take "decoder_attention_mask". Entries of the parts of a batch are found too.

        has_encoder: Whether the model has an encoder. A decoder then has tokens of its own.

    Attributes:
        unused: Why padding counts, by what it is about: a mask that cannot be read, or the name of a router with
            another number of rows than the mask.
    """

    def __init__(self, mask_fn: MaskFn | None, has_encoder: bool = False) -> None:
        self._mask_fn, self._has_encoder = mask_fn, has_encoder
        self._current = _BatchMask(None, None)
        self.unused: dict[str, str] = {}

    @classmethod
    def of(cls, model: nn.Module, mask_fn: MaskFn | None) -> "TokenMasks":
        """Return the masks for the routers of a model."""
        return cls(mask_fn, any("encoder" in _parts(path) for path, _ in model.named_modules()))

    def begin(self, batch: Batch) -> None:
        """Read the mask of a batch, None for one that is not known yet.

        Raises:
            ValueError: If ``mask_fn`` returns something else than a bool tensor (B, T) or None, or the mask differs in
                its shape from the entry "input_ids" of the batch.
        """
        if batch is None:
            self._current = _BatchMask(None, None)
            return
        if self._mask_fn is None:
            self._current = _BatchMask(self._found(batch, _FOUND), self._found(batch, _OF_DECODER))
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
        found: dict[str, list[Routing]] = {}
        for name, passes in routings.items():
            of_decoder = self._has_encoder and "decoder" in _parts(name)
            mask = self._current.decoder if of_decoder else self._current.tokens
            found[name] = [self._masked(name, routing, mask) for routing in passes]
        return found

    def _masked(self, name: str, routing: Routing, mask: Tensor | None) -> Routing:
        if mask is None or routing.mask is not None:
            return routing
        of_rows = mask_of_tokens(mask, routing)
        if of_rows is not None:
            # rows that are ordered by time first are no consecutive tokens of a sample
            num_tokens = 1 if is_time_first(mask, routing) else mask.shape[1]
            return replace(routing, mask=of_rows.to(routing.logits.device), rows_per_sample=num_tokens)
        num_rows = len(routing.logits)
        # one row for each sample, or only the rows of real tokens
        if num_rows == len(mask) or num_rows == int(mask.sum()):
            return routing
        if self._mask_fn is not None:
            raise ValueError(
                f"mask_fn: expected a mask of the tokens that router {name!r} routes, got {tuple(mask.shape)} for"
                f" {num_rows} rows."
            )
        self.unused.setdefault(
            name, f"the attention_mask {tuple(mask.shape)} does not fit the {num_rows} rows of router {name!r}"
        )
        return routing

    def _found(self, batch: Batch, name: str) -> Tensor | None:
        """Return the mask of a batch by its name, or None, with a note if there is something that cannot be used."""
        entries = list(_entries(batch, name))
        if len(entries) > 1:
            self.unused.setdefault(name, f"the batch has {len(entries)} entries called {name}")
        if len(entries) != 1:
            return None
        mask, reason = _readable(entries[0])
        if reason:
            self.unused.setdefault(name, f"the entry {name} of the batch {reason}")
        return mask


def _entries(batch: Batch, name: str) -> Iterator[Any]:
    """Yield the entries or attributes of a batch with a name, also those of its parts, None excluded."""
    if batch is None or isinstance(batch, (Tensor, str, bytes)):
        return
    if isinstance(batch, Mapping):
        if batch.get(name) is not None:
            yield batch[name]
        for part in batch.values():
            if isinstance(part, (Mapping, tuple, list)):
                yield from _entries(part, name)
    elif isinstance(batch, (tuple, list)) and not hasattr(batch, name):
        for part in batch:
            yield from _entries(part, name)
    elif getattr(batch, name, None) is not None:
        yield getattr(batch, name)


def _readable(mask: Any) -> tuple[Tensor | None, str]:
    """Return a mask (B, T) as bool, or None and why it is none, such as the summands of attention."""
    if not isinstance(mask, Tensor):
        return None, f"is a {type(mask).__name__}, not a tensor"
    if mask.dim() != 2 or mask.is_complex():
        return None, f"has the shape {tuple(mask.shape)}, not (B, T)"
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all() & (mask == 1).any()):
        return None, "is added to the scores of attention, not 1 for tokens and 0 for padding"
    mask = mask if mask.dtype == torch.bool else mask != 0
    if mask.shape[0] == mask.shape[1] > 1 and bool((mask == torch.ones_like(mask).tril()).all()):
        return None, "says which token sees which, not which is padding"
    return mask, ""


def _check(mask: Any, batch: Batch) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        got = f"{tuple(mask.shape)}, {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask_fn: expected a bool tensor (B, T), True for real tokens, got {got}. For a padding mask of torch,"
            " which is True for padding, return ~mask."
        )
    ids = next(_entries(batch, "input_ids"), None)
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
