"""How many samples change their experts from one epoch to the next, on data that come in the same order."""

import torch
from torch import Tensor

from moe_heads.callbacks.functional.landscape.routing_flips import Choices, choices_of
from moe_heads.routing import Routing, RoutingCollection

__all__ = ["EpochChoices"]

# Choices that are remembered, one byte each: 10,000 samples that choose among 64 experts with 50 tokens.
_MAX_BYTES = 2**25


class EpochChoices:
    """Choices of one router on the validation data, epoch by epoch.

    Attributes:
        reordered: Whether the data of the epoch that ended last were not those of the epoch before.
    """

    def __init__(self) -> None:
        self.reordered = False
        self._before: list[tuple[Choices, Tensor | None]] = []
        self._now: list[tuple[Choices, Tensor | None]] = []
        self._num_bytes = 0

    def add(self, passes: list[Routing], labels: Tensor | None) -> None:
        """Add the choices for a batch, made in evaluation mode."""
        collection = RoutingCollection()
        collection.routings["router"] = passes
        choices = choices_of(collection)
        self._num_bytes += sum(choice.numel() for choice in choices)
        if self._num_bytes <= _MAX_BYTES:
            self._now.append((choices, None if labels is None else labels.detach().clone()))

    def end_epoch(self) -> tuple[int, int]:
        """Compare with the epoch before.

        Returns:
            Samples that changed their set of experts, and how many were compared; both zero for the first epoch and for
            data in another order. Where the router runs more than once in a pass of the model, each time counts.
        """
        before, now = self._before, self._now
        self._before, self.reordered = now, False
        self._now, self._num_bytes = [], 0
        if not before or not now:
            return 0, 0
        if not _same_data(before, now):
            self.reordered = True
            return 0, 0
        pairs = [
            (here, there)
            for (choices, _), (earlier, _) in zip(now, before, strict=True)
            for here, there in zip(choices, earlier, strict=True)
        ]
        flipped = torch.stack([(here != there).any(1).sum() for here, there in pairs]).sum() if pairs else 0
        return int(flipped), sum(len(here) for here, _ in pairs)


def _same_data(before: list[tuple[Choices, Tensor | None]], now: list[tuple[Choices, Tensor | None]]) -> bool:
    """As far as shapes and labels can tell."""
    if len(before) != len(now):
        return False
    for (choices, labels), (earlier, labels_before) in zip(now, before, strict=True):
        if [c.shape for c in choices] != [c.shape for c in earlier] or (labels is None) != (labels_before is None):
            return False
        if labels is not None and labels_before is not None and not torch.equal(labels, labels_before):
            return False
    return True
