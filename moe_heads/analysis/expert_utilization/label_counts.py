"""Number of labels of each value in the batches of all ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.labels import BatchLabels, NoClasses

__all__ = ["COMMON_MARK", "LabelCounts"]

COMMON_MARK = 255
"""Usual mark of an ignored label, as in segmentation masks, also after a conversion to another integer type."""


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """Number of labels of each value in some batches.

    Attributes:
        values: Different labels, ascending, int64.
        counts: Number of each, int64.
        marks: Values that may mark an ignored label: 255, and the largest value of each data type.
        num_batches: Number of batches.
        num_unlabeled: Number of batches without labels.
        per_sample: Whether every batch has one label for each sample.
        problem: First reason why labels cannot be used, or None.
    """

    values: Tensor
    counts: Tensor
    marks: frozenset[int]
    num_batches: int
    num_unlabeled: int
    per_sample: bool
    problem: NoClasses | None

    @classmethod
    def of(cls, batches: Iterable[tuple[BatchLabels, int | None]]) -> "LabelCounts":
        """Count the labels of batches, each with its number of samples, or None if that is unknown."""
        total = cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), frozenset(), 0, 0, True, None)
        return total.merged([cls._of_batch(labels, num_samples) for labels, num_samples in batches])

    @classmethod
    def _of_batch(cls, labels: BatchLabels, num_samples: int | None) -> "LabelCounts":
        values = torch.empty(0, dtype=torch.int64) if labels.values is None else labels.values
        found, counts = values.unique(return_counts=True)
        per_sample = values.dim() == 1 and (num_samples is None or len(values) == num_samples)
        is_unlabeled = labels.values is None
        marks = frozenset({COMMON_MARK, labels.largest})
        return cls(found, counts, marks, 1, int(is_unlabeled), is_unlabeled or per_sample, labels.problem)

    def merged(self, others: Sequence["LabelCounts"]) -> "LabelCounts":
        """Return the counts of these and other batches together."""
        parts = [self, *others]
        values, places = torch.cat([part.values for part in parts]).unique(return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64)
        return LabelCounts(
            values,
            counts.index_add_(0, places, torch.cat([part.counts for part in parts])),
            frozenset().union(*(part.marks for part in parts)),
            sum(part.num_batches for part in parts),
            sum(part.num_unlabeled for part in parts),
            all(part.per_sample for part in parts),
            next((part.problem for part in parts if part.problem is not None), None),
        )
