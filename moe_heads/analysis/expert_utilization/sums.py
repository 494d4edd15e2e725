"""Sums over the rows of one router, from which its utilization is computed.

Shapes: B samples, N rows, E experts, C classes.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.ablation import AblationCounts
from moe_heads.analysis.expert_utilization.examples import ExpertExamples
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization, dead_and_starved
from moe_heads.analysis.expert_utilization.mutual_information import information_of_samples, permutation_baseline
from moe_heads.analysis.expert_utilization.samples import IGNORED, NO_CLASSES_HINT
from moe_heads.routing import Routing, RoutingStats

__all__ = ["ReportOptions", "UtilizationSums"]


@dataclass(frozen=True)
class ReportOptions:
    """Options for the utilization of a head.

    Attributes:
        dead_below: Fraction of the fair share below which an expert is dead.
        starved_below: Fraction of the fair share below which it is starved.
        num_permutations: Number of label permutations for the chance level of the mutual information.
        num_examples: Number of images per expert.
        seed: Seed of the permutations.
        inert_below: Fraction of the median norm of the layer below which an expert is inert.
    """

    dead_below: float
    starved_below: float
    num_permutations: int
    num_examples: int
    seed: int
    inert_below: float


class UtilizationSums:
    """Running sums of one head. They are additive, so uneven batches are weighted by their rows.

    Args:
        name: Name of the head, for messages.
        routing: A routing of the head, for its sizes.
        num_classes: C. None for data without labels.
        options: Options of the report.
    """

    def __init__(self, name: str, routing: Routing, num_classes: int | None, options: ReportOptions) -> None:
        self.name = name
        self._soft = routing.soft
        self._options = options
        self._num_experts = routing.num_experts
        self._stats: RoutingStats | None = None
        self._gate_entropy = 0.0
        self._pairs = torch.zeros(self._num_experts, self._num_experts, dtype=torch.float64)
        self._num_classes = num_classes
        self._class_gates = torch.zeros(num_classes or 0, self._num_experts, dtype=torch.float64)
        # class of each sample, and its number of choices of each expert
        self._labels: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._ablation: AblationCounts | None = None
        self._examples: ExpertExamples | None = None

    def __add__(self, other: "UtilizationSums") -> "UtilizationSums":
        """Add the sums of the same head on two ranks."""
        total = copy.copy(self)
        for name in ("_stats", "_gate_entropy", "_pairs", "_class_gates", "_labels", "_chosen", "_ablation"):
            mine, others = getattr(self, name), getattr(other, name)
            setattr(total, name, others if mine is None else mine if others is None else mine + others)
        total._add_examples(other._examples)
        return total

    def add(
        self,
        passes: Sequence[Routing],
        labels: Tensor | None,
        images: Tensor | None = None,
        counts: AblationCounts | None = None,
    ) -> None:
        """Add a batch.

        Args:
            passes: Routing of each run of the router on the batch, on the CPU.
            labels: Class of each sample, (B,), int64, on the CPU, `IGNORED` for a sample without a class.
            images: Images of the samples, (B, C, H, W).
            counts: Counts of the ablation for the batch.

        Raises:
            ValueError: If the rows do not match the B labels.
        """
        for routing in passes:
            self._add_rows(routing)
            if images is not None and len(images) * routing.rows_per_sample == len(routing.logits):
                self._add_examples(ExpertExamples.of(routing, images, labels, self._options.num_examples))
        if counts is not None:
            self._ablation = counts if self._ablation is None else self._ablation + counts
        if labels is not None and self._num_classes is not None:
            chosen = torch.stack([self._choices_of(routing, labels) for routing in passes]).sum(0)
            # a sample without finite logits is not an observation, unlike a sample that no expert chose
            routed = torch.stack([r.valid.view(-1, r.rows_per_sample).any(1) for r in passes]).any(0)
            counted = routed & (labels != IGNORED)
            if counted.any():
                self._labels.append(labels[counted])
                self._chosen.append(chosen[counted])

    def _add_rows(self, routing: Routing) -> None:
        stats = routing.stats()
        self._stats = stats if self._stats is None else self._stats + stats
        gates, chosen = routing.gates[routing.valid], routing.selected[routing.valid].double()
        shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        self._gate_entropy += float(torch.special.entr(shares).sum())
        self._pairs += chosen.t() @ chosen

    def _choices_of(self, routing: Routing, labels: Tensor) -> Tensor:
        """Count the choices of each expert by each sample, (B, E), int64, and add the gates to those of the classes."""
        valid, num_samples = routing.valid, len(routing.logits) // routing.rows_per_sample
        if len(labels) != num_samples:
            raise ValueError(
                f"label_fn: expected a label for each of the {num_samples} samples that head {self.name!r} routed, got"
                f" {len(labels)} labels. {NO_CLASSES_HINT}"
            )
        of_rows = labels.repeat_interleave(routing.rows_per_sample)
        counted = valid & (of_rows != IGNORED)
        self._class_gates.index_add_(0, of_rows[counted], routing.gates[counted])
        chosen = routing.selected & valid.unsqueeze(-1)
        return chosen.view(num_samples, routing.rows_per_sample, -1).sum(1)

    def _add_examples(self, more: ExpertExamples | None) -> None:
        if more is not None:
            known = self._examples
            self._examples = more if known is None else known.merged(more, self._options.num_examples)

    def result(self) -> HeadUtilization:
        """Compute the utilization of all rows so far.

        Raises:
            ValueError: If no row had finite logits.
        """
        stats, options = self._stats, self._options
        assert stats is not None
        num_rows = int(stats.num_rows)
        if num_rows == 0:
            raise ValueError(
                f"model: expected finite router logits, got nan or infinity in all {int(stats.num_nonfinite)} rows of"
                f" head {self.name!r}. Check the inputs and the weights."
            )
        load, importance = stats.load, stats.importance
        relative = ((importance if self._soft else load) * self._num_experts).tolist()
        dead, starved = dead_and_starved(relative, options.dead_below, options.starved_below)
        information: dict[str, Any] = {
            f"mutual_information{name}": value for name, value in self._information().items()
        }
        return HeadUtilization(
            load=load,
            importance=importance,
            entropy=float(stats.entropy),
            entropy_of_mean=_entropy(stats.mean_probs),
            effective_experts=math.exp(_entropy(importance)),
            effective_experts_per_row=math.exp(self._gate_entropy / num_rows),
            margin=float(stats.margin),
            dropped=float(stats.dropped),
            dead_experts=dead,
            starved_experts=starved,
            coactivation=self._coactivation(),
            class_map=self._class_gates / self._class_gates.sum(1, keepdim=True) if self._labels else None,
            class_counts=self._class_counts() if self._labels else None,
            **information,
            soft=self._soft,
            num_rows=num_rows,
            num_choices=int(stats.counts.sum()),
            num_nonfinite=int(stats.num_nonfinite),
            ablation=self._ablation.result() if self._ablation is not None and self._ablation.num_samples else None,
            examples=self._examples,
        )

    def _coactivation(self) -> Tensor | None:
        rows = self._pairs.diagonal()
        is_one_or_all = bool((self._pairs == torch.diag(rows)).all() or (self._pairs == self._pairs[0, 0]).all())
        return None if self._soft or is_one_or_all else self._pairs / rows.unsqueeze(1)

    def _class_counts(self) -> Tensor:
        counts = torch.zeros(self._num_classes or 0, self._num_experts, dtype=torch.int64)
        return counts.index_add_(0, torch.cat(self._labels), torch.cat(self._chosen))

    def _information(self) -> dict[str, float | None]:
        """Compute the mutual information, with the suffixes of the field names as keys."""
        found: dict[str, float | None] = dict.fromkeys(("", "_corrected", "_stderr", "_by_chance", "_p_value"))
        if not self._labels or self._num_classes is None:
            return found
        samples = torch.cat(self._labels), torch.cat(self._chosen), self._num_classes
        information = information_of_samples(*samples)
        found |= {"": information.plugin, "_corrected": information.corrected, "_stderr": information.stderr}
        if self._options.num_permutations:
            chance = permutation_baseline(*samples, self._options.num_permutations, self._options.seed)
            found |= {"_by_chance": chance.mean, "_p_value": chance.p_value}
        return found


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())
