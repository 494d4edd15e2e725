"""Check of the labels of one batch before an analysis needs them."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.counting import batch_size
from moe_heads.analysis._shared.generators import generators_kept
from moe_heads.analysis.expert_utilization.classes import decide_classes
from moe_heads.analysis.expert_utilization.label_counts import LabelCounts
from moe_heads.analysis.expert_utilization.labels import (
    LabelFn,
    NoClasses,
    labels_of_rows,
    mismatch,
    read_labels,
    reason_of,
)
from moe_heads.analysis.expert_utilization.samples import group_by_sample
from moe_heads.routing import Routing

__all__ = ["LabelCheck"]


class LabelCheck:
    """Check of the labels of one batch: their kind before the model runs, and their number afterwards.

    Args:
        label_fn: Function that returns the labels of a batch.
        class_names: Names of the classes, or None.
        ignore_index: Labels without a class.
    """

    def __init__(self, label_fn: LabelFn, class_names: Sequence[str] | None, ignore_index: frozenset[int]) -> None:
        self._label_fn, self._class_names, self._ignore_index = label_fn, class_names, ignore_index
        self._values: Tensor | None = None
        self._num_samples: int | None = None

    def before(self, batch: Batch) -> NoClasses | None:
        """Return the reason why the labels of a batch are not classes, or None."""
        with generators_kept():
            labels = read_labels(self._label_fn, own_copy(batch))
        try:
            self._num_samples = batch_size(batch)
        except ValueError:  # it is unknown
            self._num_samples = None
        counts = LabelCounts.of([(labels, self._num_samples)])
        classes = decide_classes(counts, None, self._class_names, self._ignore_index, is_whole=False)
        self._values = labels.values if classes.reason is None else None
        return classes.reason

    def after(self, routings: Mapping[str, Sequence[Routing]], foreign: Collection[str]) -> NoClasses | None:
        """Return the reason why the labels do not belong to the rows that the model routed for the batch, or None.

        Args:
            routings: Routings of the batch by the name of the head.
            foreign: Names of the heads with third-party routers.
        """
        values = self._values
        if values is None:
            return None
        problems = []
        for name, passes in routings.items():
            for routing in passes[:1]:
                grouped = group_by_sample(routing, None, self._num_samples) if name in foreign else routing
                num_rows, rows_per_sample = len(grouped.logits), grouped.rows_per_sample
                fits = labels_of_rows(values, num_rows, rows_per_sample) is not None
                problems.append(None if fits else mismatch(name, values, num_rows, rows_per_sample))
        return reason_of(problems)
