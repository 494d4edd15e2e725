"""How many samples change their experts from one validation to the next, on the same data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch, leaves_of
from moe_heads.analysis._shared.routing_flips import Choices, choices_of
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["EpochChoices"]

# Choices that are remembered, one byte each: 10,000 samples that choose among 64 experts with 50 tokens.
_MAX_BYTES = 2**25

# Numbers of a tensor that stand for it.
_FINGERPRINT = 256


@dataclass(frozen=True)
class _Chosen:
    """What the router chose for a batch, and by what the batch is known again."""

    choices: Choices
    fingerprint: list[Tensor]

    def is_of_same_data(self, other: "_Chosen") -> bool:
        pairs = [(self.choices, other.choices), (self.fingerprint, other.fingerprint)]
        if any([t.shape for t in mine] != [t.shape for t in others] for mine, others in pairs):
            return False
        return all(torch.equal(mine, others) for mine, others in zip(self.fingerprint, other.fingerprint, strict=True))


class EpochChoices:
    """Choices of one router on the validation data, epoch by epoch.

    Attributes:
        has_other_data: Whether the data of the validation that ended last were not those of the one before.
    """

    def __init__(self) -> None:
        self.has_other_data = False
        self._before: list[_Chosen] = []
        self._now: list[_Chosen] = []
        self._num_bytes = 0

    def add(self, passes: list[Routing], batch: Batch) -> None:
        """Add the choices for a batch, made in evaluation mode."""
        collection = RoutingCollection()
        collection.routings["router"] = passes
        choices = choices_of(collection)
        self._num_bytes += sum(choice.numel() for choice in choices)
        if self._num_bytes <= _MAX_BYTES:
            self._now.append(_Chosen(choices, _fingerprint(batch)))

    def end_epoch(self) -> tuple[int, int]:
        """Compare with the epoch before.

        Returns:
            Samples that changed their set of experts, and how many were compared; both zero for the first epoch and for
            other data. Where the router runs more than once in a pass of the model, each time counts.
        """
        before, now = self._before, self._now
        self._before, self._now, self._num_bytes, self.has_other_data = now, [], 0, False
        if not before or not now:
            return 0, 0
        if len(before) != len(now) or not all(map(_Chosen.is_of_same_data, now, before)):
            self.has_other_data = True
            return 0, 0
        pairs = [
            (here, there)
            for chosen, earlier in zip(now, before, strict=True)
            for here, there in zip(chosen.choices, earlier.choices, strict=True)
        ]
        flipped = torch.stack([(here != there).any(1).sum() for here, there in pairs]).sum() if pairs else 0
        return int(flipped), sum(len(here) for here, _ in pairs)


def _fingerprint(batch: Batch) -> list[Tensor]:
    """Some numbers of each tensor of a batch, labels or not, nan or not."""
    flat = [leaf.detach().flatten() for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]
    return [numbers[:: max(1, len(numbers) // _FINGERPRINT)].nan_to_num().clone() for numbers in flat]
