"""Labels of a batch: reading them, and assigning them to the rows of a router.

Shapes: B samples, T tokens, R rows of a router.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.expert_utilization.label_entry import UnclearLabelsError

__all__ = [
    "IGNORED",
    "NO_CLASSES_HINT",
    "BatchLabels",
    "LabelFn",
    "NoClasses",
    "labels_of_rows",
    "mismatch",
    "read_labels",
    "reason_of",
]

IGNORED = -100
"""Label of a sample without a class, which `torch.nn.functional.cross_entropy` ignores by default."""

NO_CLASSES_HINT = "For data without classes pass label_fn=lambda batch: None."
"""Last sentence of the messages about labels."""

LabelFn = Callable[[Batch], Any]
"""``label_fn(batch) -> labels``, integers (B,), (B, T) or (R,), or None."""


@dataclass(frozen=True)
class NoClasses:
    """Reason why there are no classes.

    Attributes:
        text: The reason, and a remedy.
        is_odd: Whether a user would expect classes. False for data without labels, and for labels that are token ids.
    """

    text: str
    is_odd: bool = True


@dataclass(frozen=True, eq=False)
class BatchLabels:
    """Labels of a batch.

    Attributes:
        values: (B,), (R,), or (B, T) for labels of tokens, int64, on the CPU. None without labels.
        largest: Largest value of their data type.
        problem: Reason why they cannot be used, or None.
    """

    values: Tensor | None = None
    largest: int = torch.iinfo(torch.int64).max
    problem: NoClasses | None = None


def read_labels(label_fn: LabelFn, batch: Batch) -> BatchLabels:
    """Read the labels of a batch. An error of ``label_fn`` and labels of another kind are a `BatchLabels.problem`."""
    try:
        labels = label_fn(batch)
    except UnclearLabelsError as error:
        return BatchLabels(problem=NoClasses(f"{error} {NO_CLASSES_HINT}", error.is_odd))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return BatchLabels(problem=NoClasses(f"label_fn: failed with {type(error).__name__}: {error}"))
    if labels is None:
        return BatchLabels()
    if not isinstance(labels, Tensor):
        # labels of objects in an image, texts, and the like
        return _problem(f"expected a tensor of integers, got {type(labels).__name__}.")
    if labels.is_nested or labels.layout != torch.strided:
        return _problem("expected a dense tensor of integers, got a nested or sparse tensor.")
    got = f"{tuple(labels.shape)}, {labels.dtype}"
    if labels.is_floating_point() or labels.is_complex():
        return _problem(f"expected integers, got {got}.{_remedy(labels)}")
    if labels.dim() == 0:
        return _problem(f"expected one label for each sample (B,) or token (B, T), got {got}.")
    labels = labels.detach().cpu()
    largest = 1 if labels.dtype == torch.bool else torch.iinfo(labels.dtype).max
    # in an unsigned type IGNORED would equal a valid class
    values = labels.long()
    if values.dim() > 1:
        values = values.flatten(1)
        values = values.squeeze(1) if values.shape[1] == 1 else values
    return BatchLabels(values, largest)


def labels_of_rows(labels: Tensor, num_rows: int, rows_per_sample: int) -> Tensor | None:
    """Return the label of each row of a router, (R,), or None if the labels do not match the rows.

    Args:
        labels: (B,) for the samples whose consecutive rows these are, (B, T) for their tokens, or (R,).
        num_rows: R.
        rows_per_sample: Number of consecutive rows of a sample, 1 if unknown.
    """
    num_samples = num_rows // rows_per_sample
    if labels.dim() == 1:
        if len(labels) == num_samples:
            return labels.repeat_interleave(rows_per_sample)
        return labels if len(labels) == num_rows else None
    fits = labels.numel() == num_rows and (rows_per_sample == 1 or len(labels) == num_samples)
    return labels.flatten() if fits else None


def mismatch(name: str, labels: Tensor, num_rows: int, rows_per_sample: int) -> NoClasses:
    """Describe labels that do not match the rows of the router called ``name``."""
    samples = f" ({num_rows // rows_per_sample} samples of {rows_per_sample} rows)" if rows_per_sample > 1 else ""
    return NoClasses(
        f"label_fn: expected a label for each of the {num_rows} rows that head {name!r} routed in a batch{samples}, or"
        f" for each sample if all have the same number of rows, got {tuple(labels.shape)}.{_remedy(labels)} If the"
        f" routed rows are some of the tokens, return one label for each of these rows. {NO_CLASSES_HINT}"
    )


def reason_of(problems: Sequence[NoClasses | None]) -> NoClasses | None:
    """Return the first problem of several heads, with the number of other heads that have one, or None."""
    found = [problem for problem in problems if problem is not None]
    if len(found) < 2:
        return found[0] if found else None
    return NoClasses(f"{found[0].text} The same holds for {len(found) - 1} more of {len(problems)} heads.")


def _problem(message: str) -> BatchLabels:
    return BatchLabels(problem=NoClasses(f"label_fn: {message} {NO_CLASSES_HINT}"))


def _remedy(labels: Tensor) -> str:
    """Return advice for one-hot and multi-label rows and for whole numbers of a floating-point type."""
    if labels.is_complex() or not labels.numel():
        return ""
    is_whole = bool((labels == labels.round()).all()) if labels.is_floating_point() else True
    if labels.dim() == 2 and labels.shape[1] > 1 and bool(((labels == 0) | (labels == 1)).all()):
        if bool((labels.sum(1) == 1).all()):
            return " For one-hot rows return labels.argmax(-1)."
        return " For multi-label data there is no single class of a sample. Return one of them, or None."
    if labels.is_floating_point() and is_whole:
        return " For classes of a floating-point type return labels.long()."
    return ""
