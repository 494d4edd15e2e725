"""The classes of the samples: which labels count, and how many classes there are."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch

__all__ = ["IGNORED", "SAY_NONE", "are_names", "check_class_names", "labels_by", "names_of_classes", "num_classes_of"]

IGNORED = -100
"""Label of a sample without a class: what `torch.nn.functional.cross_entropy` ignores by default."""


SAY_NONE = "Pass label_fn=lambda batch: None to do without classes"
"""The way out that a message about labels names."""

# Whole numbers that go further than this, and than there are samples, are counts or targets rather than classes.
_MOST_CLASSES = 1000


def labels_by(label_fn: Callable[[Batch], Tensor | None], batch: Batch) -> Tensor | None:
    """The labels (B,) of a batch, int64, or None.

    Raises:
        ValueError: If they are not one whole number a sample.
    """
    labels = label_fn(batch)
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise ValueError(f"label_fn: expected a tensor (B,) or None, got {type(labels).__name__}. {SAY_NONE}")
    flat = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    if flat.dim() != 1 or flat.is_floating_point() or flat.is_complex():
        raise ValueError(
            f"label_fn: expected one whole number a sample, shape (B,), got {tuple(labels.shape)}, {labels.dtype}."
            f" {SAY_NONE}"
        )
    return flat.long()  # in an unsigned type the label of no class would be that of some class


def num_classes_of(
    found: Sequence[Tensor | None], num_classes: int | None, class_names: Sequence[str] | None
) -> int | None:
    """C; None without labels, and where they are no classes: more of them than samples, and than a thousand.

    Args:
        found: Labels of each batch; see `labels_by`.
        num_classes: C as the caller gave it.
        class_names: Names as the caller gave them.

    Raises:
        ValueError: If names and number disagree, some batches have no labels, or a label is no class.
    """
    if class_names is not None and num_classes is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names: expected num_classes = {num_classes} names, got {len(class_names)}")
    given = [labels.cpu() for labels in found if labels is not None]
    if not given:
        return None
    if len(given) < len(found):
        raise ValueError(f"label_fn: expected labels for every batch or for none; {len(found) - len(given)} have none")
    counted = torch.cat(given)
    counted = counted[counted != IGNORED]
    if not len(counted):
        return None
    lowest, highest = (int(bound) for bound in counted.aminmax())
    if num_classes is None and class_names is None and highest >= max(_MOST_CLASSES, len(counted)):
        return None
    if num_classes is None:
        num_classes = highest + 1 if class_names is None else len(class_names)
    if lowest < 0 or highest >= num_classes:
        named = f" (there are {len(class_names)} class_names)" if class_names is not None else ""
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}{named}, or {IGNORED} for a sample without a class; got"
            f" {lowest} to {highest}. {SAY_NONE}"
        )
    return num_classes


def are_names(names: object) -> TypeGuard[Sequence[str]]:
    """Whether these are names that can be counted, and not one name."""
    return isinstance(names, Collection) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def check_class_names(class_names: object) -> None:
    """Refuse what cannot name the classes."""
    if class_names is not None and not are_names(class_names):
        raise ValueError(f"class_names: expected a list of names, got {class_names!r}")


def names_of_classes(num_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes, numbers where none are given; none without labels."""
    if num_classes is None:
        return ()
    return tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes))
