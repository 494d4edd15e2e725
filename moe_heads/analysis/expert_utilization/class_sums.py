"""Sums by class over the rows of one router, from which its class map and mutual information are computed.

Shapes: B samples, T tokens, R rows, E experts, C classes, G groups of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.classes import Classes
from moe_heads.analysis.expert_utilization.labels import IGNORED, BatchLabels, NoClasses, labels_of_rows, mismatch
from moe_heads.analysis.expert_utilization.mutual_information import (
    MIN_GROUPS,
    information_of_groups,
    information_of_samples,
    mutual_information,
    permutation_baseline,
)
from moe_heads.routing import Routing

__all__ = ["ClassSums", "ClassUtilization"]

# Largest number of groups of samples for the jackknife, and of counts in all of them: 4 MB for each head, unless the
# smallest number of groups needs more.
_MAX_GROUPS, _MAX_COUNTS = 64, 2**20


@dataclass(frozen=True, eq=False)
class ClassUtilization:
    """Quantities of one head that need classes. See `HeadUtilization`. All are None without classes."""

    class_map: Tensor | None = None
    class_counts: Tensor | None = None
    mutual_information: float | None = None
    mutual_information_corrected: float | None = None
    mutual_information_stderr: float | None = None
    mutual_information_by_chance: float | None = None
    mutual_information_p_value: float | None = None


class ClassSums:
    """Running sums of one head, over samples with a class or over rows with a class of their own.

    Choices of samples are kept, since their errors depend on the choices of a sample together. Choices of tokens are
    only counted, by group of samples: there may be millions.

    Args:
        name: Name of the head, for messages.
        num_experts: E.
        classes: Classes of the data.

    Attributes:
        problem: Reason why the labels do not belong to the rows of this head, or None.
    """

    def __init__(self, name: str, num_experts: int, classes: Classes) -> None:
        self._name, self._num_experts, self._classes = name, num_experts, classes
        self.problem: NoClasses | None = None
        self._gates: Tensor | None = None
        # class of each sample, and its number of choices of each expert
        self._labels: list[Tensor] = []
        self._chosen: list[Tensor] = []
        # number of choices of the rows of each class in each group of samples, (G, C, E)
        self._groups: Tensor | None = None
        self._num_clusters = 0

    def merged(self, other: "ClassSums") -> "ClassSums":
        """Add the sums of the same head on another rank."""
        total = ClassSums(self._name, self._num_experts, self._classes)
        total.problem = self.problem or other.problem
        total._gates, total._groups = _sum(self._gates, other._gates), _sum(self._groups, other._groups)
        total._labels, total._chosen = self._labels + other._labels, self._chosen + other._chosen
        total._num_clusters = self._num_clusters + other._num_clusters
        return total

    def add(self, passes: Sequence[Routing], labels: BatchLabels) -> None:
        """Add a batch.

        Args:
            passes: Routing of each run of the router on the batch, on the CPU.
            labels: Labels of the batch, `IGNORED` for no class.
        """
        if self._classes.num_classes is None or self.problem is not None:
            return
        if labels.values is None:
            self.problem = labels.problem or NoClasses("label_fn: expected labels for all batches, got None.")
            return
        of_rows = []
        for routing in passes:
            num_rows, rows_per_sample = len(routing.logits), routing.rows_per_sample
            found = labels_of_rows(labels.values, num_rows, rows_per_sample)
            if found is None or (self._classes.per_sample and len(labels.values) * rows_per_sample != num_rows):
                self.problem = mismatch(self._name, labels.values, num_rows, rows_per_sample)
                return
            of_rows.append(found)
        for routing, of_row in zip(passes, of_rows, strict=True):
            counted = routing.valid & (of_row != IGNORED)
            if self._gates is None:
                self._gates = torch.zeros(self._classes.num_classes, self._num_experts, dtype=torch.float64)
            self._gates.index_add_(0, of_row[counted], routing.gates[counted].double())
        if self._classes.per_sample:
            self._add_samples(passes, labels.values)
        else:
            self._add_rows(passes, of_rows, labels.values)

    def _add_samples(self, passes: Sequence[Routing], labels: Tensor) -> None:
        chosen = torch.stack([_choices_of_samples(routing) for routing in passes]).sum(0)
        # a sample without finite logits is not an observation, unlike a sample that no expert chose
        routed = torch.stack([r.valid.view(-1, r.rows_per_sample).any(1) for r in passes]).any(0)
        counted = routed & (labels != IGNORED)
        if counted.any():
            self._labels.append(labels[counted])
            self._chosen.append(chosen[counted])

    def _add_rows(self, passes: Sequence[Routing], of_rows: Sequence[Tensor], labels: Tensor) -> None:
        num_classes = self._classes.num_classes or 0
        if self._groups is None:
            num_groups = min(_MAX_GROUPS, max(2 * MIN_GROUPS, _MAX_COUNTS // (num_classes * self._num_experts)))
            self._groups = torch.zeros(num_groups, num_classes, self._num_experts, dtype=torch.int32)
        # rows of one sample depend on each other; without known samples, those of a batch may do so
        routing = passes[0]
        num_clusters = 1
        if labels.dim() == 2:
            num_clusters = len(labels)
        elif routing.rows_per_sample > 1:
            num_clusters = len(routing.logits) // routing.rows_per_sample
        generator = torch.Generator().manual_seed(self._num_clusters)
        groups = torch.randint(len(self._groups), (num_clusters,), generator=generator)
        self._num_clusters += num_clusters
        for routing, of_row in zip(passes, of_rows, strict=True):
            counted = routing.valid & (of_row != IGNORED)
            group = groups.repeat_interleave(len(of_row) // num_clusters)
            cells = group[counted] * num_classes + of_row[counted]
            self._groups.flatten(0, 1).index_add_(0, cells, routing.selected[counted].int())

    def result(self, num_permutations: int, seed: int) -> ClassUtilization:
        """Compute the quantities of all samples so far.

        Args:
            num_permutations: Number of label permutations for the chance level, for labels of samples.
            seed: Seed of the permutations.
        """
        if self.problem is not None or self._gates is None:
            return ClassUtilization()
        found = self._of_samples(num_permutations, seed) if self._classes.per_sample else self._of_groups()
        if found.class_counts is None:
            return found
        return replace(found, class_map=self._gates / self._gates.sum(1, keepdim=True))

    def _of_samples(self, num_permutations: int, seed: int) -> ClassUtilization:
        if not self._labels:
            return ClassUtilization()
        num_classes = self._classes.num_classes or 0
        samples = torch.cat(self._labels), torch.cat(self._chosen), num_classes
        counts = torch.zeros(num_classes, self._num_experts, dtype=torch.int64).index_add_(0, *samples[:2])
        information = information_of_samples(*samples)
        found = ClassUtilization(
            class_counts=counts,
            mutual_information=information.plugin,
            mutual_information_corrected=information.corrected,
            mutual_information_stderr=information.stderr,
        )
        if not num_permutations:
            return found
        chance = permutation_baseline(*samples, num_permutations, seed)
        return replace(found, mutual_information_by_chance=chance.mean, mutual_information_p_value=chance.p_value)

    def _of_groups(self) -> ClassUtilization:
        if self._groups is None or not self._groups.any():
            return ClassUtilization()
        counts = self._groups.sum(0)
        if int(self._groups.flatten(1).any(1).sum()) < MIN_GROUPS:
            return ClassUtilization(class_counts=counts, mutual_information=mutual_information(counts).plugin)
        information = information_of_groups(self._groups)
        return ClassUtilization(
            class_counts=counts,
            mutual_information=information.plugin,
            mutual_information_corrected=information.corrected,
            mutual_information_stderr=information.stderr,
        )


def _choices_of_samples(routing: Routing) -> Tensor:
    """Count the choices of each expert by each sample, (B, E), int64."""
    chosen = routing.selected & routing.valid.unsqueeze(-1)
    return chosen.view(-1, routing.rows_per_sample, routing.num_experts).sum(1)


def _sum(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
    return others if mine is None else mine if others is None else mine + others
