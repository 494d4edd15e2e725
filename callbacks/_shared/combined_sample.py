"""Combination of several training loaders in the modes of Lightning's `CombinedLoader`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, tree_unflatten

from moe_heads.analysis._shared.batch_list import Batches

__all__ = ["Part", "combined"]


@dataclass(frozen=True)
class Part:
    """Batches drawn from one of several loaders.

    Attributes:
        name: Key path of the loader in the collection.
        batches: The batches.
        sizes: Number of samples of each batch.
        description: Description of the draw.
    """

    name: str
    batches: Sequence[Any]
    sizes: Sequence[int]
    description: str

    @property
    def num_samples(self) -> int:
        """Total number of samples."""
        return sum(self.sizes)


def combined(parts: Sequence[Part], structure: TreeSpec, mode: str) -> tuple[Batches, str]:
    """Combine the batches of several loaders step by step.

    Args:
        parts: The batches drawn from each loader.
        structure: Structure of the collection and of each combined batch.
        mode: "max_size_cycle" runs until the longest loader ends and repeats the others. "max_size" puts None in place
            of loaders that have ended. "min_size" runs until the shortest loader ends. "sequential" runs one loader
            after the other.

    Returns:
        The combined batches, whose sizes are sums over their parts, and their description for the report.
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
