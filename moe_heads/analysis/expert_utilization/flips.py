"""Routing flips: samples whose experts change from one validation to the next, on the same data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch, leaves_of
from moe_heads.analysis._shared.routing_flips import Choices, choices_of
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["EpochChoices"]

# Limit of the stored choices, one byte each: 10,000 samples of 50 tokens that choose among 64 experts.
_MAX_BYTES = 2**25

# Number of elements of a tensor that identify it.
_FINGERPRINT_SIZE = 256


@dataclass(frozen=True)
class _BatchChoices:
    """Choices of the router for a batch, and a fingerprint that identifies the batch."""

    choices: Choices
    fingerprint: list[Tensor]

    def has_same_data(self, other: "_BatchChoices") -> bool:
        pairs = [(self.choices, other.choices), (self.fingerprint, other.fingerprint)]
        if any([t.shape for t in mine] != [t.shape for t in others] for mine, others in pairs):
            return False
        return all(torch.equal(mine, others) for mine, others in zip(self.fingerprint, other.fingerprint, strict=True))


class EpochChoices:
    """Choices of one router on the validation data, epoch by epoch.

    Attributes:
        data_changed: Whether the data of the last two validations differ.
    """

    def __init__(self) -> None:
        self.data_changed = False
        self._before: list[_BatchChoices] = []
        self._now: list[_BatchChoices] = []
        self._num_bytes = 0

    def add(self, passes: list[Routing], batch: Batch) -> None:
        """Add the choices for a batch, made in evaluation mode."""
        collection = RoutingCollection()
        collection.routings["router"] = passes
        choices = choices_of(collection)
        self._num_bytes += sum(choice.numel() for choice in choices)
        if self._num_bytes <= _MAX_BYTES:
            self._now.append(_BatchChoices(choices, _fingerprint(batch)))

    def end_epoch(self) -> tuple[int, int]:
        """Compare the choices with those of the previous epoch.

        Returns:
            The number of samples whose set of experts changed, and the number of compared samples. Both are zero for
            the first epoch and for different data. If the router runs several times in a pass of the model, each run
            counts.
        """
        before, now = self._before, self._now
        self._before, self._now, self._num_bytes, self.data_changed = now, [], 0, False
        if not before or not now:
            return 0, 0
        if len(before) != len(now) or not all(map(_BatchChoices.has_same_data, now, before)):
            self.data_changed = True
            return 0, 0
        pairs = [
            (here, there)
            for chosen, earlier in zip(now, before, strict=True)
            for here, there in zip(chosen.choices, earlier.choices, strict=True)
        ]
        flipped = torch.stack([(here != there).any(1).sum() for here, there in pairs]).sum() if pairs else 0
        return int(flipped), sum(len(here) for here, _ in pairs)


def _fingerprint(batch: Batch) -> list[Tensor]:
    """Return some elements of each tensor of a batch, labels included, with nan replaced."""
    flat = [leaf.detach().flatten() for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
    return [numbers[:: max(1, len(numbers) // _FINGERPRINT_SIZE)].nan_to_num().clone() for numbers in flat]
