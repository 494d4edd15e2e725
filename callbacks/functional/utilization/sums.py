"""Sums over the rows of one router, from which its utilisation follows.

Shapes: N rows, E experts, C classes.
"""

import copy
import math

import torch
from torch import Tensor

from moe_heads.callbacks.functional.utilization.head import HeadUtilization
from moe_heads.callbacks.functional.utilization.mutual_information import mutual_information
from moe_heads.routing import Routing, RoutingStats

__all__ = ["UtilizationSums"]


class UtilizationSums:
    """Running sums of one head; exact under addition, so uneven batches count by their rows.

    Args:
        name: Name of the head, for messages.
        routing: A routing of the head, for its sizes.
        num_classes: C; None for data without labels.
    """

    def __init__(self, name: str, routing: Routing, num_classes: int | None) -> None:
        self.name = name
        self._soft = routing.soft
        self._stats: RoutingStats | None = None
        num_experts = routing.num_experts
        self._num_samples = 0
        shape = None if num_classes is None else (num_classes, num_experts)
        self._class_gates = None if shape is None else torch.zeros(shape, dtype=torch.float64)
        self._class_counts = None if shape is None else torch.zeros(shape, dtype=torch.int64)

    def __add__(self, other: "UtilizationSums") -> "UtilizationSums":
        """The sums of both: of one head on two ranks."""
        total = copy.copy(self)
        for name in ("_stats", "_num_samples", "_class_gates", "_class_counts"):
            mine, others = getattr(self, name), getattr(other, name)
            setattr(total, name, None if mine is None else mine + others)
        return total

    def add(self, routing: Routing, labels: Tensor | None) -> None:
        """Add the rows of a batch.

        Args:
            routing: Its routing, on the CPU.
            labels: Class of each sample, (B,).

        Raises:
            ValueError: If the rows are not those of B samples.
        """
        stats = routing.stats()
        self._stats = stats if self._stats is None else self._stats + stats
        valid = routing.valid
        self._num_samples += len(valid) // routing.rows_per_sample
        if labels is None or self._class_gates is None or self._class_counts is None:
            return
        if len(valid) != len(labels) * routing.rows_per_sample:
            raise ValueError(
                f"label_fn: expected a label for each of the {len(valid) // routing.rows_per_sample} samples that head "
                f"{self.name!r} routed; got {len(labels)} labels"
            )
        rows = labels.long().repeat_interleave(routing.rows_per_sample)[valid]
        self._class_gates.index_add_(0, rows, routing.gates[valid])
        # a row that no expert took has no top expert
        taken = ~routing.dropped[valid]
        top = routing.top[valid][taken]
        self._class_counts.index_put_((rows[taken], top), torch.ones_like(top), accumulate=True)

    def result(self, dead_below: float) -> HeadUtilization:
        """The utilisation of all rows so far.

        Args:
            dead_below: Fraction of the fair share under which an expert is dead.

        Raises:
            ValueError: If no row had finite logits.
        """
        stats = self._stats
        assert stats is not None
        num_rows = int(stats.num_rows)
        if num_rows == 0:
            raise ValueError(
                f"model: expected finite router logits; all {int(stats.num_nonfinite)} rows of head {self.name!r} "
                "have nan or inf"
            )
        load, importance = stats.load, stats.importance
        share = importance if self._soft else load
        information = None if self._class_counts is None else mutual_information(self._class_counts)
        # the tokens of a sample are not independent: only the samples are counted for the standard error
        widening = math.sqrt((num_rows + int(stats.num_nonfinite)) / self._num_samples)
        return HeadUtilization(
            load=load,
            importance=importance,
            entropy=float(stats.entropy),
            entropy_of_mean=_entropy(stats.mean_probs),
            effective_experts=math.exp(_entropy(importance)),
            dead_experts=tuple(
                index for index, s in enumerate(share.tolist()) if s == 0 or s * len(share) < dead_below
            ),
            class_map=None if self._class_gates is None else self._class_gates / self._class_gates.sum(1, keepdim=True),
            mutual_information=None if information is None else information.plugin,
            mutual_information_corrected=None if information is None else information.corrected,
            mutual_information_stderr=None if information is None else information.stderr * widening,
            soft=self._soft,
            num_rows=num_rows,
            num_nonfinite=int(stats.num_nonfinite),
        )


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())
