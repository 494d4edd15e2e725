"""Several training loaders together, in the modes of Lightning's `CombinedLoader`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, tree_unflatten

from moe_heads.analysis._shared.batch_list import Batches

__all__ = ["Part", "combined"]


@dataclass(frozen=True)
class Part:
    """What was drawn of one of the loaders.

    Attributes:
        name: Place of the loader in the collection.
        batches: Its batches.
        sizes: Number of samples of each.
        description: How they were drawn.
    """

    name: str
    batches: Sequence[Any]
    sizes: Sequence[int]
    description: str

    @property
    def num_samples(self) -> int:
        """Samples in all."""
        return sum(self.sizes)


def combined(parts: Sequence[Part], structure: TreeSpec, mode: str) -> tuple[Batches, str]:
    """Combine the batches of several loaders step by step.

    Args:
        parts: What was drawn of each loader.
        structure: Of the collection, which each batch has too.
        mode: "max_size_cycle": as many steps as the longest has, the others begin again; "max_size": None in place of
            those that have ended; "min_size": as many steps as the shortest has; "sequential": one after the other.

    Returns:
        The batches, each of as many samples as its parts have together, and what the report says of them.
    """
    if mode == "sequential":
        batches = [batch for part in parts for batch in part.batches]
        sizes = [size for part in parts for size in part.sizes]
        return Batches(batches, sizes), f"{len(parts)} loaders one after the other: {_described(parts)}"
    lengths = [len(part.batches) for part in parts]
    num_steps = min(lengths) if mode == "min_size" else max(lengths)
    batches, sizes = [], []
    used = [0] * len(parts)
    for step in range(num_steps):
        entries: list[Any] = []
        size = 0
        for place, part in enumerate(parts):
            at = step % len(part.batches) if mode == "max_size_cycle" else step
            is_there = at < len(part.batches)
            entries.append(part.batches[at] if is_there else None)
            size += part.sizes[at] if is_there else 0
            used[place] += part.sizes[at] if is_there else 0
        batches.append(tree_unflatten(entries, structure))
        sizes.append(size)
    notes = [_note(part, number) for part, number in zip(parts, used, strict=True) if number != part.num_samples]
    described = f"{len(parts)} loaders together ({mode}), {num_steps} steps: {_described(parts)}"
    return Batches(batches, sizes), "; ".join([described, *notes])


def _described(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.name}: {part.description}" for part in parts)


def _note(part: Part, num_used: int) -> str:
    if num_used < part.num_samples:
        return f"{part.num_samples - num_used:,} of the {part.num_samples:,} samples of {part.name} are dropped"
    return f"the {part.num_samples:,} samples of {part.name} are repeated, {num_used:,} in all"
