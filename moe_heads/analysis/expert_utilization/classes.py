"""Classes of the data, decided from the labels of all batches of all ranks.

Shapes: B samples, T tokens, C classes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.label_counts import COMMON_MARK, LabelCounts
from moe_heads.analysis.expert_utilization.labels import (
    IGNORED,
    NO_CLASSES_HINT,
    BatchLabels,
    LabelFn,
    NoClasses,
    read_labels,
)

__all__ = [
    "Classes",
    "check_class_names",
    "checked_ignore_index",
    "classes_of",
    "decide_classes",
    "listed",
]

# Labels that exceed this number and the number of samples are counts, regression targets or token ids.
_MAX_CLASSES = 1000

# Largest number of ignored values in a message.
_MAX_LISTED = 5

# Pairs of labels that encode two classes as often as one class and a mark.
_BINARY = ({-1, 1}, {0, COMMON_MARK})


@dataclass(frozen=True)
class Classes:
    """Classes of the data.

    Attributes:
        num_classes: C, or None if there are none.
        names: Their names.
        per_sample: Whether a label belongs to a sample. Otherwise it belongs to a token or row.
        ignored: Number of labels by value that stands for no class. It includes the values that were given but do not
            occur, with 0.
        reason: Reason why there are no classes, or None.
    """

    num_classes: int | None = None
    names: tuple[str, ...] = ()
    per_sample: bool = True
    ignored: dict[int, int] = field(default_factory=dict)
    reason: NoClasses | None = None

    @classmethod
    def of(cls, num_classes: int | None, class_names: Sequence[str] | None, **others: Any) -> "Classes":
        """Build the classes with their names, by default their numbers."""
        if num_classes is None:
            return cls(**others)
        names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
        return cls(num_classes, names, **others)

    def read(self, label_fn: LabelFn, batch: Batch) -> BatchLabels:
        """Read the labels of a batch, with `IGNORED` in place of every value that stands for no class."""
        if self.num_classes is None:
            return BatchLabels()
        labels = read_labels(label_fn, batch)
        if labels.values is None:
            return labels
        marks = torch.tensor([value for value in self.ignored if value >= 0], dtype=torch.int64)
        is_ignored = (labels.values < 0) | torch.isin(labels.values, marks)
        values = labels.values.masked_fill(is_ignored, IGNORED)
        if bool((values >= self.num_classes).any()):
            return BatchLabels(problem=_OTHER_LABELS)
        return replace(labels, values=values)


_OTHER_LABELS = NoClasses("label_fn: expected the same labels in every call for a batch, got different ones.")

_UNLABELED = NoClasses(
    "the batches have no labels: no second entry of a pair, and no entry 'labels', 'label', 'y', 'target' or 'targets',"
    " or label_fn returned None. Pass label_fn to provide them.",
    is_odd=False,
)


def classes_of(
    label_fn: LabelFn,
    batches: Batches,
    ranks: Ranks,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    ignore_index: frozenset[int],
) -> Classes:
    """Read the labels of the batches of all ranks and decide the classes, the same on every rank."""
    with ranks.synchronized():
        read = (read_labels(label_fn, own_copy(batch)) for batch in batches)
        counts = LabelCounts.of(zip(read, batches.sizes, strict=True))
    first, *others = ranks.gather(counts)
    return decide_classes(first.merged(others), num_classes, class_names, ignore_index)


def decide_classes(
    counts: LabelCounts,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    ignore_index: frozenset[int] = frozenset(),
    *,
    is_whole: bool = True,
) -> Classes:
    """Decide the number of classes and the labels that stand for no class.

    Negative labels and those in ``ignore_index`` stand for no class. So does the largest label if it is 255 or the
    largest value of its data type, and either C is known and not larger, or the gap below it is wider than every other
    gap between the labels.

    There are no classes if a batch has no or unsuitable labels, if a label is C or larger, or if C is unknown and more
    than a thousand. For one label per sample the last limit is the number of labels if that is larger. Labels that are
    only -1 and 1, or only 0 and 255, may encode two classes or mark a part of one, and are not classes either.

    Args:
        counts: Labels of all batches.
        num_classes: C as passed by the caller.
        class_names: Names as passed by the caller.
        ignore_index: Labels without a class as passed by the caller.
        is_whole: Whether these are the labels of all data. Otherwise what more data can change is not a reason.
    """
    if counts.problem is not None:
        return Classes(reason=counts.problem)
    if counts.num_unlabeled == counts.num_batches:
        return Classes(reason=_UNLABELED)
    if counts.num_unlabeled:
        return _none(
            f"label_fn: expected labels for all batches or for none, got {counts.num_unlabeled} of"
            f" {counts.num_batches} batches without."
        )
    known = num_classes if class_names is None else len(class_names)
    count_of = dict(zip(counts.values.tolist(), counts.counts.tolist(), strict=True))
    ignored = dict.fromkeys(sorted(ignore_index), 0)
    ignored |= {value: count for value, count in count_of.items() if value < 0 or value in ignore_index}
    mark = _mark([value for value in count_of if value not in ignored], counts.marks, known)
    if mark is not None:
        ignored[mark] = count_of[mark]
    classes = [value for value in count_of if value not in ignored]
    if known is not None and classes and classes[-1] >= known:
        named = f" ({len(class_names)} class_names)" if class_names is not None else ""
        above = sum(count_of[value] for value in classes if value >= known)
        return _none(
            f"labels: expected classes 0 to {known - 1}{named}, got {above} labels up to {classes[-1]}. Pass"
            " ignore_index for labels without a class."
        )
    if is_whole and set(count_of) in _BINARY and not ignore_index & set(count_of) and (known or 0) <= max(count_of):
        low, high = count_of
        return _none(
            f"labels: expected classes from 0, got only {low} and {high}, which are two classes, or one class and a"
            f" mark for samples without one. For a mark pass ignore_index={low if low < 0 else high}. For two classes"
            " pass a label_fn that returns 0 and 1."
        )
    if is_whole and not classes:
        return _none(f"labels: expected a class for at least one sample, got ignored labels only: {listed(ignored)}.")
    limit = max(_MAX_CLASSES, sum(count_of[value] for value in classes)) if counts.per_sample else _MAX_CLASSES
    if known is None and classes and classes[-1] >= limit and (is_whole or not counts.per_sample):
        message = (
            f"labels: expected classes, got integers up to {classes[-1]}, as for counts, regression targets and token"
            " ids. Pass class_names if they are classes."
        )
        return Classes(reason=NoClasses(message, is_odd=False))
    found = max(classes, default=0) + 1 if known is None else known
    return Classes.of(found, class_names, per_sample=counts.per_sample, ignored=ignored)


def listed(ignored: dict[int, int]) -> str:
    """Return the number of labels without a class by value, as text. Values that do not occur are left out."""
    found = [f"{value} ({count})" for value, count in ignored.items() if count]
    more = f" and {len(found) - _MAX_LISTED} more values" if len(found) > _MAX_LISTED else ""
    return ", ".join(found[:_MAX_LISTED]) + more


def check_class_names(num_classes: int | None, class_names: Sequence[str] | None) -> None:
    """Check that there is one name for each of C classes, if both are given."""
    if class_names is not None and num_classes is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names: expected num_classes = {num_classes} names, got {len(class_names)}.")


def checked_ignore_index(ignore_index: Any) -> frozenset[int]:
    """Return the values of ``ignore_index``, an integer, a list of integers, or None.

    Raises:
        ValueError: If it is anything else.
    """
    values = (ignore_index,) if isinstance(ignore_index, Integral) else ignore_index
    if ignore_index is None:
        return frozenset()
    is_list = isinstance(values, Collection) and not isinstance(values, (str, bytes))
    if not is_list or not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        raise ValueError(f"ignore_index: expected an integer, a list of integers or None, got {ignore_index!r}.")
    return frozenset(map(int, values))


def _mark(values: Sequence[int], marks: frozenset[int], num_classes: int | None) -> int | None:
    """Return the largest label if it marks labels without a class, or None.

    Args:
        values: Different labels of at least 0, ascending.
        marks: Values that may be a mark.
        num_classes: C if it is known.
    """
    if not values or values[-1] not in marks - {0, 1}:
        return None
    if num_classes is not None:
        return values[-1] if values[-1] >= num_classes else None
    gaps = [high - low - 1 for low, high in zip([-1, *values], values, strict=False)]
    return values[-1] if gaps[-1] > max(gaps[:-1], default=0) else None


def _none(message: str) -> Classes:
    return Classes(reason=NoClasses(f"{message} {NO_CLASSES_HINT}"))
