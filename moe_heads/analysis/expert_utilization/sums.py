"""Sums over the rows of one router, from which its utilization is computed.

Shapes: B samples, N rows, E experts.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.ablation import AblationCounts
from moe_heads.analysis.expert_utilization.class_sums import ClassSums
from moe_heads.analysis.expert_utilization.classes import Classes
from moe_heads.analysis.expert_utilization.examples import ExpertExamples
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization, dead_and_starved
from moe_heads.analysis.expert_utilization.labels import BatchLabels, NoClasses
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
        classes: Classes of the data.
        options: Options of the report.
    """

    def __init__(self, name: str, routing: Routing, classes: Classes, options: ReportOptions) -> None:
        self.name = name
        self._soft = routing.soft
        self._options = options
        self._num_experts = routing.num_experts
        self._stats: RoutingStats | None = None
        self._gate_entropy = 0.0
        self._pairs = torch.zeros(self._num_experts, self._num_experts, dtype=torch.float64)
        self._classes = ClassSums(name, self._num_experts, classes)
        self._ablation: AblationCounts | None = None
        self._examples: ExpertExamples | None = None

    def __add__(self, other: "UtilizationSums") -> "UtilizationSums":
        """Add the sums of the same head on two ranks."""
        total = copy.copy(self)
        for name in ("_stats", "_gate_entropy", "_pairs", "_ablation"):
            mine, others = getattr(self, name), getattr(other, name)
            setattr(total, name, others if mine is None else mine if others is None else mine + others)
        total._classes = self._classes.merged(other._classes)
        total._add_examples(other._examples)
        return total

    @property
    def no_classes(self) -> NoClasses | None:
        """Reason why the labels of the data do not belong to the rows of this head, or None."""
        return self._classes.problem

    def add(
        self,
        passes: Sequence[Routing],
        labels: BatchLabels,
        images: Tensor | None = None,
        counts: AblationCounts | None = None,
    ) -> None:
        """Add a batch.

        Args:
            passes: Routing of each run of the router on the batch, on the CPU.
            labels: Labels of the batch, `IGNORED` for a sample or row without a class.
            images: Images of the samples, (B, C, H, W).
            counts: Counts of the ablation for the batch.
        """
        of_samples = None
        if images is not None and labels.values is not None and labels.values.shape == images.shape[:1]:
            of_samples = labels.values
        for routing in passes:
            self._add_rows(routing)
            if images is not None and len(images) * routing.rows_per_sample == len(routing.logits):
                self._add_examples(ExpertExamples.of(routing, images, of_samples, self._options.num_examples))
        if counts is not None:
            self._ablation = counts if self._ablation is None else self._ablation + counts
        self._classes.add(passes, labels)

    @property
    def stats(self) -> RoutingStats:
        """Sums over the rows so far."""
        assert self._stats is not None
        return self._stats

    def _add_rows(self, routing: Routing) -> None:
        stats = routing.stats()
        self._stats = stats if self._stats is None else self._stats + stats
        gates, chosen = routing.gates[routing.valid], routing.selected[routing.valid].double()
        shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        self._gate_entropy += float(torch.special.entr(shares).sum())
        self._pairs += chosen.t() @ chosen

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
        return HeadUtilization(
            load=load,
            importance=importance,
            entropy=float(stats.entropy),
            entropy_of_mean=_entropy(stats.mean_probs),
            effective_experts=math.exp(_entropy(importance)),
            effective_experts_per_row=math.exp(self._gate_entropy / num_rows),
            margin=float(stats.margin),
            dropped=float(stats.dropped),
            dropped_choices=float(stats.dropped_choices),
            dead_experts=dead,
            starved_experts=starved,
            coactivation=self._coactivation(),
            **vars(self._classes.result(options.num_permutations, options.seed)),
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


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())
