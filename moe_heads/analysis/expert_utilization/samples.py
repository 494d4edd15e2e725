"""Samples of a batch: their class labels, the names of the classes, and the rows of a router that belong to them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.routing import Routing

__all__ = ["IGNORED", "NO_CLASSES_HINT", "group_by_sample", "names_of_classes", "num_classes_of", "read_labels"]

IGNORED = -100
"""Label of a sample without a class, which `torch.nn.functional.cross_entropy` ignores by default."""

NO_CLASSES_HINT = "Pass label_fn=lambda batch: None to analyze the data without classes."
"""Remedy in the error messages about labels."""

# Labels that exceed this number and the number of samples are counts or regression targets rather than classes.
_MAX_CLASSES = 1000


def read_labels(label_fn: Callable[[Batch], Tensor | None], batch: Batch) -> Tensor | None:
    """Return the labels (B,) of a batch, int64, or None.

    Raises:
        ValueError: If they are not one integer per sample.
    """
    labels = label_fn(batch)
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise ValueError(f"label_fn: expected a tensor (B,) or None, got {type(labels).__name__}. {NO_CLASSES_HINT}")
    flat = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    if flat.dim() != 1 or flat.is_floating_point() or flat.is_complex():
        raise ValueError(
            f"label_fn: expected one integer per sample, shape (B,), got {tuple(labels.shape)}, {labels.dtype}."
            f" {NO_CLASSES_HINT}"
        )
    return flat.long()  # in an unsigned type IGNORED would equal a valid class


def num_classes_of(
    found: Sequence[Tensor | None], num_classes: int | None, class_names: Sequence[str] | None
) -> int | None:
    """Return C, or None if there are no labels or the labels are not classes.

    Labels are not classes if they imply more than a thousand classes and more classes than samples.

    Args:
        found: Labels of each batch, from `read_labels`.
        num_classes: C as passed by the caller.
        class_names: Names as passed by the caller.

    Raises:
        ValueError: If the number of names differs from C, some batches have no labels, or a label is out of range.
    """
    if class_names is not None and num_classes is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names: expected num_classes = {num_classes} names, got {len(class_names)}.")
    given = [labels.cpu() for labels in found if labels is not None]
    if not given:
        return None
    if len(given) < len(found):
        raise ValueError(
            f"label_fn: expected labels for all batches or for none, got {len(found) - len(given)} batches without."
            f" {NO_CLASSES_HINT}"
        )
    counted = torch.cat(given)
    counted = counted[counted != IGNORED]
    if not len(counted):
        return None
    lowest, highest = (int(bound) for bound in counted.aminmax())
    if num_classes is None and class_names is None and highest >= max(_MAX_CLASSES, len(counted)):
        return None
    if num_classes is None:
        num_classes = highest + 1 if class_names is None else len(class_names)
    if lowest < 0 or highest >= num_classes:
        named = f" ({len(class_names)} class_names)" if class_names is not None else ""
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1}{named}, or {IGNORED} for a sample without a class, got"
            f" {lowest} to {highest}. {NO_CLASSES_HINT}"
        )
    return num_classes


def names_of_classes(num_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes, by default their numbers, or an empty tuple without labels."""
    if num_classes is None:
        return ()
    return tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes))


def group_by_sample(routing: Routing, batch: Batch, num_samples: int | None = None) -> Routing:
    """Treat the rows of a third-party router as the consecutive tokens of the samples, if their number allows it.

    Args:
        routing: Routing of an adapter. If it has ``rows_per_sample``, it is returned unchanged.
        batch: Batch on which the model ran.
        num_samples: Number of samples of the batch. By default it is read from its tensors.
    """
    try:
        num_samples = batch_size(batch) if num_samples is None else num_samples
    except ValueError:  # the number of samples is unknown
        return routing
    num_rows = len(routing.logits)
    is_flat = routing.rows_per_sample == 1 and num_rows > num_samples and num_rows % num_samples == 0
    return replace(routing, rows_per_sample=num_rows // num_samples) if is_flat else routing
